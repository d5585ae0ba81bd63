//! Applying the activity log to the bitmap after a crash (`spec/metadata.md` §7.5).

use crate::al::{Outcome, Replay};
use crate::{AL_EXTENT_SECTORS, Bitmap, DeviceFlags, Superblock};

/// What applying did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Bits newly set, summed over all slots.
    pub marked_bits: u64,
    /// The same in bytes of data.
    pub marked_bytes: u64,
    /// Hot extents that start behind the end of the bitmap; nothing was marked for them.
    pub skipped_extents: Vec<u32>,
    /// The ring has to be written anew ([`crate::al::initialized_block`] everywhere).
    pub reinitialize_ring: bool,
    /// The ring was unusable, which does not matter because no primary was writing.
    pub ignored: Option<ApplyError>,
}

/// Why the log cannot be applied; fatal only if a primary may have been writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// No valid block (error 1).
    #[error(
        "No usable activity log was found, so it is unknown which data the crash left out of sync; \
         invalidate this device or create its metadata anew (create-md)."
    )]
    NoUsableLog,
    /// No update among damaged blocks (error 2).
    #[error(
        "No valid activity-log update was found among damaged blocks, so it is unknown which data the \
         crash left out of sync; invalidate this device or create its metadata anew (create-md)."
    )]
    NoUpdate,
}

/// Marks the hot extents out of sync in every slot if a primary may have been writing, and marks the
/// superblock clean. Pure: the caller then writes **bitmap, ring, superblock** in that order, each
/// durable before the next, so that an interrupted run can be repeated.
///
/// With a bitmap made by [`Bitmap::with_padding`] the result is bit for bit that of the reference tool;
/// with an exact bitmap an extent that reaches over the device's end is cut. An extent that reaches over
/// the end of a padded bitmap is cut as well, where the reference skips it altogether and so loses marks.
pub fn apply_al(
    superblock: &mut Superblock,
    replay: &Replay,
    bitmap: &mut Bitmap,
) -> Result<Applied, ApplyError> {
    let primary = superblock.flags.contains(DeviceFlags::PRIMARY_IND);
    let error = match replay.outcome {
        Outcome::Clean | Outcome::Replayed => None,
        Outcome::NoUsableLog => Some(ApplyError::NoUsableLog),
        Outcome::NoUpdate => Some(ApplyError::NoUpdate),
    };
    if let (Some(error), true) = (error, primary) {
        return Err(error);
    }
    let mut applied = Applied {
        marked_bits: 0,
        marked_bytes: 0,
        skipped_extents: Vec::new(),
        reinitialize_ring: replay.outcome != Outcome::Clean,
        ignored: error,
    };
    let hot = primary.then_some(&replay.hot_extents).into_iter().flatten();
    for &extent in hot {
        let start = u64::from(extent) * AL_EXTENT_SECTORS;
        if start >= bitmap.sectors() {
            applied.skipped_extents.push(extent);
            continue;
        }
        for slot in 0..bitmap.slots() {
            applied.marked_bits += bitmap.set_out_of_sync(slot, start..start + AL_EXTENT_SECTORS);
        }
    }
    applied.marked_bytes = applied.marked_bits.saturating_mul(u64::from(bitmap.bytes_per_bit()));
    superblock.mark_clean();
    Ok(applied)
}
