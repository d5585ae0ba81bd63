//! Agreement on protocol version and features (§4.1).

use thiserror::Error;

use crate::{APV_MAX_84, ConnectionFeatures, Features};

/// First version of DRBD 9 that current kernels and this implementation speak (§1.3).
const APV_V9_MIN: u32 = 118;

/// Two nodes cannot talk; trying again does not help (§2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum NegotiationError {
    /// The ranges do not overlap.
    #[error(
        "The peer speaks protocol versions {peer_min} to {peer_max}, this node {own_min} to {own_max}; upgrade the older one."
    )]
    NoCommonVersion {
        /// Lowest version here.
        own_min: u32,
        /// Highest version here.
        own_max: u32,
        /// Lowest version of the peer.
        peer_min: u32,
        /// Highest version of the peer.
        peer_max: u32,
    },
    /// Versions 102 to 117 are spoken by early DRBD 9 only.
    #[error(
        "The peer's newest protocol version is {apv}; of DRBD 9 only 118 and later are supported, so upgrade the peer."
    )]
    EarlyV9 {
        /// The version both could speak.
        apv: u32,
    },
    /// 9.2.0 to 9.2.2 acknowledge merged discards wrongly.
    #[error(
        "The peer runs DRBD 9.2.0, 9.2.1 or 9.2.2, which can lose data in a resync of discards; upgrade the peer."
    )]
    MergedDiscards,
}

impl ConnectionFeatures {
    /// The highest version, also of ancient peers that send 0.
    #[must_use]
    pub const fn effective_max(&self) -> u32 {
        if self.protocol_max == 0 { self.protocol_min } else { self.protocol_max }
    }

    /// Agreed protocol version and features of this node and its peer. Node ids are not compared: a
    /// mismatch there is worth another attempt.
    ///
    /// # Errors
    /// There is no version both can speak safely.
    pub fn negotiate(&self, peer: &Self) -> Result<(u32, Features), NegotiationError> {
        let (own_min, own_max) = (self.protocol_min, self.effective_max());
        let (peer_min, peer_max) = (peer.protocol_min, peer.effective_max());
        if own_max < peer_min || own_min > peer_max {
            return Err(NegotiationError::NoCommonVersion { own_min, own_max, peer_min, peer_max });
        }
        let apv = own_max.min(peer_max);
        if apv > APV_MAX_84 && apv < APV_V9_MIN {
            return Err(NegotiationError::EarlyV9 { apv });
        }
        let features = self.features & peer.features;
        if apv == 121 && features.contains(Features::RESYNC_DAGTAG) {
            return Err(NegotiationError::MergedDiscards);
        }
        Ok((apv, features))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(protocol_min: u32, protocol_max: u32, features: u32) -> ConnectionFeatures {
        ConnectionFeatures {
            protocol_min,
            features: Features(features),
            protocol_max,
            sender_node_id: 0,
            receiver_node_id: 0,
        }
    }

    #[test]
    fn versions() {
        let own = node(86, 124, 1023);
        assert_eq!(own.negotiate(&node(86, 101, 15)), Ok((101, Features::V84)));
        assert_eq!(own.negotiate(&node(86, 124, 127)), Ok((124, Features::V9_2_18)));
        assert_eq!(own.negotiate(&node(90, 0, 0)), Ok((90, Features::NONE)));
        assert_eq!(own.negotiate(&node(86, 117, 15)), Err(NegotiationError::EarlyV9 { apv: 117 }));
        assert_eq!(own.negotiate(&node(118, 121, 31)), Err(NegotiationError::MergedDiscards));
        assert_eq!(own.negotiate(&node(118, 121, 15)), Ok((121, Features::V84)));
        for peer in [node(80, 85, 0), node(125, 130, 0)] {
            assert!(matches!(own.negotiate(&peer), Err(NegotiationError::NoCommonVersion { .. })));
        }
    }
}
