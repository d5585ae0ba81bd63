//! Endpoints of replication paths: `[FAMILY:]ADDRESS[:PORT]` (`spec/cli.md` §10).

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Port used where an address names none.
const PORT_DEFAULT: u16 = 7788;

/// Address family of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AddressFamily {
    /// TCP over IPv4.
    Ipv4,
    /// TCP over IPv6.
    Ipv6,
    /// Sockets direct protocol; known by name only.
    Sdp,
    /// Super sockets; known by name only.
    Ssocks,
}

impl AddressFamily {
    /// The keyword.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
            Self::Sdp => "sdp",
            Self::Ssocks => "ssocks",
        }
    }
}

/// One end of a path; serialised as in `status --json` (`address`, `port`, `family`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Endpoint {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// The family.
    pub family: AddressFamily,
}

/// Text that is not an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "'{text}' is not an address; expected [FAMILY:]ADDRESS[:PORT], for example ipv4:10.0.0.1:7788 or \
     ipv6:[fd00::1]:7788"
)]
pub struct AddressError {
    /// What was given.
    pub text: String,
}

impl Endpoint {
    /// An endpoint whose family follows from the address.
    #[must_use]
    pub fn new(address: IpAddr, port: u16) -> Self {
        let family = if address.is_ipv4() { AddressFamily::Ipv4 } else { AddressFamily::Ipv6 };
        Self { address, port, family }
    }

    /// `ADDRESS:PORT`, IPv6 addresses in brackets.
    #[must_use]
    pub fn host_port(&self) -> String {
        match self.address {
            IpAddr::V4(a) => format!("{a}:{}", self.port),
            IpAddr::V6(a) => format!("[{a}]:{}", self.port),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.family.as_str(), self.host_port())
    }
}

impl FromStr for Endpoint {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let bad = || AddressError { text: text.to_owned() };
        let mut rest = text;
        for prefix in ["local:", "peer:"] {
            if let Some(r) = rest.strip_prefix(prefix) {
                rest = r;
                break;
            }
        }
        let mut family = None;
        for f in [AddressFamily::Ipv4, AddressFamily::Ipv6, AddressFamily::Sdp, AddressFamily::Ssocks] {
            if let Some(r) = rest.strip_prefix(f.as_str()).and_then(|r| r.strip_prefix(':')) {
                family = Some(f);
                rest = r;
                break;
            }
        }
        let (host, port) = if let Some(r) = rest.strip_prefix('[') {
            let (host, tail) = r.split_once(']').ok_or_else(bad)?;
            (
                host,
                tail.strip_prefix(':')
                    .map_or(if tail.is_empty() { Ok(None) } else { Err(bad()) }, |p| Ok(Some(p)))?,
            )
        } else if let Some((host, port)) = rest.split_once(':') {
            if port.contains(':') { (rest, None) } else { (host, Some(port)) }
        } else {
            (rest, None)
        };
        let address: IpAddr = host.parse().map_err(|_| bad())?;
        let port = match port {
            Some(p) => p.parse::<u16>().ok().filter(|p| *p != 0).ok_or_else(bad)?,
            None => PORT_DEFAULT,
        };
        let implied = Endpoint::new(address, port);
        match family {
            Some(AddressFamily::Ipv4 | AddressFamily::Sdp | AddressFamily::Ssocks) if !address.is_ipv4() => {
                Err(bad())
            }
            Some(AddressFamily::Ipv6) if address.is_ipv4() => Err(bad()),
            Some(family) => Ok(Endpoint { family, ..implied }),
            None => Ok(implied),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_round_trip() {
        for text in ["ipv4:10.0.0.1:7788", "ipv6:[fd00::1]:7001", "ssocks:10.0.0.1:99"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn short_forms() {
        assert_eq!("10.0.0.1".parse::<Endpoint>().unwrap().to_string(), "ipv4:10.0.0.1:7788");
        assert_eq!("fd00::1".parse::<Endpoint>().unwrap().to_string(), "ipv6:[fd00::1]:7788");
        assert_eq!("local:ipv4:1.2.3.4:5".parse::<Endpoint>().unwrap().to_string(), "ipv4:1.2.3.4:5");
    }

    #[test]
    fn nonsense_is_refused() {
        for text in
            ["", "ipv4:", "ipv4:host:1", "ipv6:1.2.3.4:1", "ipv4:1.2.3.4:0", "[::1]x", "1.2.3.4:70000"]
        {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }
}
