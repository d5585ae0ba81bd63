//! Shared-secret authentication of a connection, and the digests of data.
//!
//! Pure functions: the random challenge comes from the caller, packets are somebody else's. Rules:
//! `spec/wire-protocol.md` §4.3 (challenge and response) and §6.4 (digests). A secret never shows up in
//! debug output, and responses are compared in constant time.

use std::fmt;

use hmac::{Hmac, Mac};
use md5::Md5;
use sha1::Sha1;
use sha2::{Digest, Sha256, Sha512};

/// Length in bytes of a challenge.
pub const CHALLENGE_LEN: usize = 64;
/// Longest challenge that an 8.4 node accepts.
pub const CHALLENGE_LEN_MAX_84: usize = 128;

/// First protocol version whose responses cover the responder's node id.
const APV_WITH_NODE_ID: u32 = 110;

/// The option `shared-secret`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes the secret as configured.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    fn key(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(hidden)")
    }
}

/// Why authentication failed, or an algorithm cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// The configured name is not one of the supported ones.
    #[error("The digest algorithm '{name}' is not supported here; use one of {supported} on both nodes.")]
    UnknownAlgorithm {
        /// As configured.
        name: String,
        /// Names that would do.
        supported: &'static str,
    },
    /// The peer sent back our own challenge.
    #[error(
        "The peer answered the authentication with our own challenge; this looks like a reflection attack."
    )]
    Reflected,
    /// The challenge has a length that the protocol does not allow.
    #[error("The peer's authentication challenge is {len} bytes long; expected {expected}.")]
    ChallengeLength {
        /// Bytes received.
        len: usize,
        /// What is allowed.
        expected: &'static str,
    },
    /// The response has another length than our digest: the algorithms differ.
    #[error(
        "The peer's authentication response is {len} bytes long, ours would be {expected}; \
         configure the same cram-hmac-alg on both nodes."
    )]
    ResponseLength {
        /// Bytes received.
        len: usize,
        /// Bytes of the own algorithm.
        expected: usize,
    },
    /// The response is wrong: the secrets differ.
    #[error("The peer's authentication response is wrong; configure the same shared-secret on both nodes.")]
    Mismatch,
    /// The secret cannot be used as a key.
    #[error("The shared-secret cannot be used as a key; configure another one.")]
    Key,
}

impl AuthError {
    /// The connection goes StandAlone; otherwise it is tried again (§4.3).
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Reflected | Self::Mismatch | Self::UnknownAlgorithm { .. } | Self::Key => true,
            Self::ChallengeLength { .. } | Self::ResponseLength { .. } => false,
        }
    }
}

/// The option `cram-hmac-alg`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HmacAlg {
    /// `md5`
    Md5,
    /// `sha1`
    Sha1,
    /// `sha256`
    Sha256,
    /// `sha512`
    Sha512,
}

impl HmacAlg {
    /// The algorithm with this Linux crypto name.
    pub fn parse(name: &str) -> Result<Self, AuthError> {
        Ok(match name {
            "md5" => Self::Md5,
            "sha1" => Self::Sha1,
            "sha256" => Self::Sha256,
            "sha512" => Self::Sha512,
            _ => {
                let supported = "sha256, sha512, sha1, md5";
                return Err(AuthError::UnknownAlgorithm { name: name.to_owned(), supported });
            }
        })
    }

    /// Bytes of a response.
    pub fn output_len(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    fn sign(self, secret: &Secret, message: &[&[u8]]) -> Result<Vec<u8>, AuthError> {
        match self {
            Self::Md5 => Ok(keyed::<Hmac<Md5>>(secret, message)?.finalize().into_bytes().to_vec()),
            Self::Sha1 => Ok(keyed::<Hmac<Sha1>>(secret, message)?.finalize().into_bytes().to_vec()),
            Self::Sha256 => Ok(keyed::<Hmac<Sha256>>(secret, message)?.finalize().into_bytes().to_vec()),
            Self::Sha512 => Ok(keyed::<Hmac<Sha512>>(secret, message)?.finalize().into_bytes().to_vec()),
        }
    }

    /// Compares in constant time.
    fn check(self, secret: &Secret, message: &[&[u8]], response: &[u8]) -> Result<(), AuthError> {
        let checked = match self {
            Self::Md5 => keyed::<Hmac<Md5>>(secret, message)?.verify_slice(response),
            Self::Sha1 => keyed::<Hmac<Sha1>>(secret, message)?.verify_slice(response),
            Self::Sha256 => keyed::<Hmac<Sha256>>(secret, message)?.verify_slice(response),
            Self::Sha512 => keyed::<Hmac<Sha512>>(secret, message)?.verify_slice(response),
        };
        checked.map_err(|_| AuthError::Mismatch)
    }
}

fn keyed<M: Mac + hmac::digest::KeyInit>(secret: &Secret, message: &[&[u8]]) -> Result<M, AuthError> {
    let mut mac = <M as Mac>::new_from_slice(secret.key()).map_err(|_| AuthError::Key)?;
    for part in message {
        mac.update(part);
    }
    Ok(mac)
}

/// Checks the peer's challenge before answering it: its length, and that it is not our own.
pub fn check_challenge(apv: u32, own_challenge: &[u8], challenge: &[u8]) -> Result<(), AuthError> {
    let (allowed, expected) = if apv >= APV_WITH_NODE_ID {
        (CHALLENGE_LEN..=CHALLENGE_LEN, "64")
    } else {
        (CHALLENGE_LEN..=CHALLENGE_LEN_MAX_84, "64 to 128")
    };
    if !allowed.contains(&challenge.len()) {
        return Err(AuthError::ChallengeLength { len: challenge.len(), expected });
    }
    if challenge == own_challenge { Err(AuthError::Reflected) } else { Ok(()) }
}

/// The response to `challenge`; from protocol 110 on it also covers the responder's node id.
pub fn response(
    alg: HmacAlg,
    secret: &Secret,
    apv: u32,
    challenge: &[u8],
    responder_node_id: u8,
) -> Result<Vec<u8>, AuthError> {
    alg.sign(secret, &message(apv, challenge, &u32::from(responder_node_id).to_be_bytes()))
}

/// Checks the peer's response to our own challenge.
pub fn verify(
    alg: HmacAlg,
    secret: &Secret,
    apv: u32,
    own_challenge: &[u8],
    peer_node_id: u8,
    response: &[u8],
) -> Result<(), AuthError> {
    if response.len() != alg.output_len() {
        return Err(AuthError::ResponseLength { len: response.len(), expected: alg.output_len() });
    }
    alg.check(secret, &message(apv, own_challenge, &u32::from(peer_node_id).to_be_bytes()), response)
}

fn message<'a>(apv: u32, challenge: &'a [u8], node_id: &'a [u8; 4]) -> Vec<&'a [u8]> {
    if apv >= APV_WITH_NODE_ID { vec![challenge, node_id] } else { vec![challenge] }
}

/// The options `data-integrity-alg`, `csums-alg` and `verify-alg`: unkeyed digests of data (§6.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DigestAlg {
    /// `crc32c`: 4 bytes, little endian.
    Crc32c,
    /// `md5`
    Md5,
    /// `sha1`
    Sha1,
    /// `sha256`
    Sha256,
    /// `sha512`
    Sha512,
}

impl DigestAlg {
    /// The algorithm with this Linux crypto name.
    pub fn parse(name: &str) -> Result<Self, AuthError> {
        Ok(match name {
            "crc32c" => Self::Crc32c,
            "md5" => Self::Md5,
            "sha1" => Self::Sha1,
            "sha256" => Self::Sha256,
            "sha512" => Self::Sha512,
            _ => {
                let supported = "crc32c, sha256, sha512, sha1, md5";
                return Err(AuthError::UnknownAlgorithm { name: name.to_owned(), supported });
            }
        })
    }

    /// Bytes of a digest.
    pub fn output_len(self) -> usize {
        match self {
            Self::Crc32c => 4,
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }
}

/// The digest of `data`, in the bytes that travel on the wire.
pub fn digest(alg: DigestAlg, data: &[u8]) -> Vec<u8> {
    match alg {
        DigestAlg::Crc32c => crc32c::crc32c(data).to_le_bytes().to_vec(),
        DigestAlg::Md5 => Md5::digest(data).to_vec(),
        DigestAlg::Sha1 => Sha1::digest(data).to_vec(),
        DigestAlg::Sha256 => Sha256::digest(data).to_vec(),
        DigestAlg::Sha512 => Sha512::digest(data).to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HMACS: [(HmacAlg, &str); 4] = [
        (HmacAlg::Md5, "md5"),
        (HmacAlg::Sha1, "sha1"),
        (HmacAlg::Sha256, "sha256"),
        (HmacAlg::Sha512, "sha512"),
    ];

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    fn challenge() -> Vec<u8> {
        (0..64).collect()
    }

    /// The constructed vectors of `spec/wire-protocol.md` §4.3.
    #[test]
    fn vectors() {
        let secret = Secret::new("secret");
        let answer =
            |apv, node| hex(&response(HmacAlg::Sha1, &secret, apv, &challenge(), node).expect("a key"));
        assert_eq!(answer(101, 0), "afe9485a34cf04a78c4f0101a2a08974b912de08");
        assert_eq!(answer(101, 1), answer(101, 0));
        assert_eq!(answer(110, 0), "51941e997b620c8c3a2b570191f1b854192bd939");
        assert_eq!(answer(124, 1), "43121955015e1176582520bf9fe0b85c07ea1eb0");
    }

    /// RFC 2202 and RFC 4231, test case 2: the other algorithms are the right ones.
    #[test]
    fn rfc_vectors() {
        let secret = Secret::new("Jefe");
        let data = b"what do ya want for nothing?";
        let want = [
            "750c783e6ab0b503eaa86e310a5db738",
            "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79",
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
            "164b7a7bfcf819e2e395fbe73b56e0a387bd64222e831fd610270cd7ea2505549758bf75c05a994a6d034f65f8f0e6fd\
             caeab1a34d4a6b4b636e070a38bce737",
        ];
        for ((alg, _), want) in HMACS.into_iter().zip(want) {
            let got = response(alg, &secret, 101, data, 0).expect("a key");
            assert_eq!((hex(&got).as_str(), got.len()), (want, alg.output_len()));
        }
    }

    #[test]
    fn verification() {
        let secret = Secret::new("secret");
        for (alg, name) in HMACS {
            assert_eq!(HmacAlg::parse(name), Ok(alg));
            let good = response(alg, &secret, 124, &challenge(), 1).expect("a key");
            assert_eq!(verify(alg, &secret, 124, &challenge(), 1, &good), Ok(()));
            assert_eq!(verify(alg, &secret, 124, &challenge(), 2, &good), Err(AuthError::Mismatch));
            assert_eq!(verify(alg, &secret, 101, &challenge(), 1, &good), Err(AuthError::Mismatch));
            assert_eq!(
                verify(alg, &Secret::new("Secret"), 124, &challenge(), 1, &good),
                Err(AuthError::Mismatch)
            );
            for bit in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(verify(alg, &secret, 124, &challenge(), 1, &bad), Err(AuthError::Mismatch));
            }
            let short = verify(alg, &secret, 124, &challenge(), 1, &good[1..]).expect_err("too short");
            assert!(matches!(short, AuthError::ResponseLength { .. }) && !short.is_permanent());
            assert!(verify(alg, &secret, 124, &challenge(), 1, &[]).is_err());
        }
        assert!(AuthError::Mismatch.is_permanent() && AuthError::Reflected.is_permanent());
    }

    #[test]
    fn challenges() {
        let (own, other) = (challenge(), vec![9; 64]);
        assert_eq!(check_challenge(124, &own, &other), Ok(()));
        assert_eq!(check_challenge(124, &own, &own), Err(AuthError::Reflected));
        assert_eq!(check_challenge(101, &own, &[9; 128]), Ok(()));
        for (apv, len) in [(124, 63), (124, 65), (124, 0), (101, 63), (101, 129)] {
            let error = check_challenge(apv, &own, &vec![9; len]).expect_err("length");
            assert!(matches!(error, AuthError::ChallengeLength { .. }), "{apv} {len}");
        }
    }

    #[test]
    fn digests() {
        let rows = [
            ("crc32c", "839206e3"),
            ("md5", "25f9e794323b453885f5181f1b624d0b"),
            ("sha1", "f7c3bc1d808e04732adf679965ccc34ca7ae3441"),
            ("sha256", "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225"),
        ];
        for (name, want) in rows {
            let alg = DigestAlg::parse(name).expect("supported");
            let got = digest(alg, b"123456789");
            assert_eq!((hex(&got).as_str(), got.len()), (want, alg.output_len()), "{name}");
        }
        let sha512 = digest(DigestAlg::Sha512, b"123456789");
        assert_eq!(sha512.len(), DigestAlg::parse("sha512").map(DigestAlg::output_len).expect("supported"));
        let unknown = DigestAlg::parse("crc32").expect_err("another polynomial");
        assert!(
            unknown.to_string().starts_with("The digest algorithm 'crc32' is not supported here; use one of")
        );
        assert!(HmacAlg::parse("crc32c").is_err(), "no digest to build an HMAC on");
    }

    #[test]
    fn secrets_are_not_printed() {
        let text = format!("{:?}", Some(("sha1", Secret::new("pssst"))));
        assert!(!text.contains("pssst"), "{text}");
    }
}
