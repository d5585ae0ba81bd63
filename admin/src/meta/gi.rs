//! Generation identifiers on disk: `get-gi`, `show-gi`, `set-gi`.

use palisade_metadata::{DeviceFlags, PeerFlags, Superblock, Version, gi as show};

use super::{EXIT_ARGUMENT, Job, NO_METADATA};
use crate::cli::{Failure, print};

pub fn get(job: &mut Job) -> Result<i32, Failure> {
    let (superblock, _) = job.superblock("")?;
    print(&format!("{}\n", show::gi_line(&superblock, job.node_id())));
    Ok(0)
}

pub fn show_frame(job: &mut Job) -> Result<i32, Failure> {
    let (superblock, _) = job.superblock("")?;
    print(&show::show_gi(&superblock, job.node_id()));
    Ok(0)
}

pub fn set(job: &mut Job) -> Result<i32, Failure> {
    let wanted =
        job.argument(0).ok_or_else(|| Failure::new(EXIT_ARGUMENT, "Required Argument missing"))?.to_owned();
    let (before, layout) = job.superblock(NO_METADATA)?;
    let node_id = job.node_id();
    let mut after = before.clone();
    for (index, element) in wanted.split(':').enumerate().filter(|(_, e)| !e.is_empty()) {
        set_element(&mut after, node_id, index, element).map_err(|e| Failure::new(EXIT_ARGUMENT, e))?;
    }
    print(&format!("previously {}\n", show::gi_line(&before, node_id)));
    print(&format!("set GI to  {}\n", show::gi_line(&after, node_id)));
    if !job.question.ask(&[], "Write new GI to disk?") {
        print("Operation canceled.\n");
        return Ok(0);
    }
    job.store(&layout, &after)?;
    Ok(0)
}

/// Sixteen hexadecimal digits at most, with or without `0x`.
pub fn uuid(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u64::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'))
}

fn set_element(sb: &mut Superblock, node_id: usize, index: usize, element: &str) -> Result<(), String> {
    const UUIDS: usize = 4;
    const V08: [DeviceFlags; 7] = [
        DeviceFlags::CONSISTENT,
        DeviceFlags::WAS_UP_TO_DATE,
        DeviceFlags::PRIMARY_IND,
        DeviceFlags::CONNECTED_IND,
        DeviceFlags::FULL_SYNC,
        DeviceFlags::PEER_OUTDATED,
        DeviceFlags::CRASHED_PRIMARY,
    ];
    const V09: [DeviceFlags; 7] = [
        DeviceFlags::CONSISTENT,
        DeviceFlags::WAS_UP_TO_DATE,
        DeviceFlags::PRIMARY_IND,
        DeviceFlags::CRASHED_PRIMARY,
        DeviceFlags::AL_CLEAN,
        DeviceFlags::AL_DISABLED,
        DeviceFlags::PRIMARY_LOST_QUORUM,
    ];
    const PEER: [PeerFlags; 5] = [
        PeerFlags::CONNECTED,
        PeerFlags::OUTDATED,
        PeerFlags::FENCING,
        PeerFlags::FULL_SYNC,
        PeerFlags::DEVICE_SEEN,
    ];
    let slot = if sb.version == Version::V08 { 0 } else { node_id };
    if index < UUIDS {
        let value = uuid(element).ok_or_else(|| format!("'{element}' is not a number."))?;
        match index {
            0 => sb.current_uuid = value,
            1 => {
                if let Some(peer) = sb.peers.get_mut(slot) {
                    peer.bitmap_uuid = value;
                }
            }
            2 => sb.history[0] = value,
            _ => sb.history[1] = value,
        }
        return Ok(());
    }
    let on = match element {
        "0" => false,
        "1" => true,
        other => return Err(format!("'{other}' is not 0 or 1.")),
    };
    let device = if sb.version == Version::V08 { &V08 } else { &V09 };
    let flag = index - UUIDS;
    let peer_flag = flag.checked_sub(device.len()).filter(|_| sb.version == Version::V09);
    if let Some(flag) = device.get(flag) {
        sb.flags.set(*flag, on);
    } else if let (Some(flag), Some(peer)) = (peer_flag.and_then(|f| PEER.get(f)), sb.peers.get_mut(slot)) {
        peer.flags.set(*flag, on);
    } else {
        return Err(format!("'{element}' is one element too many."));
    }
    Ok(())
}
