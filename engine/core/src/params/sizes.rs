//! P_SIZES and the size of a volume (`spec/wire-protocol.md` §4.6–4.12).
//!
//! Data in use must never shrink because of what a peer says; a peer that is too small is refused.

use crate::connection::Veto;
use crate::core::Core;
use crate::io::{LogLevel, Output};
use crate::types::{NodeId, VolumeNr};
use palisade_metadata::PeerFlags;
use palisade_wire::enums::DiskState;
use palisade_wire::{DdsFlags, Packet, QueueLimits, Sizes};

impl Core {
    pub(crate) fn send_sizes(&mut self, n: NodeId, v: VolumeNr) {
        let Some(d) = self.devs.get(&v) else { return };
        let usable = d.ldev.as_ref().map_or(0, |l| l.layout.usable_sectors);
        let d_size = if d.ldev.is_none() {
            0
        } else {
            // The smallest disk this partition knows of.
            self.st
                .connected_mask()
                .iter()
                .filter_map(|m| self.pds.get(&(m, v)).map(|p| p.d_size))
                .filter(|s| *s > 0)
                .fold(usable, u64::min)
        };
        let (physical, logical, discard) = d
            .ldev
            .as_ref()
            .map_or((512, 512, false), |l| (l.physical_block_size, l.logical_block_size, l.discard));
        let sizes = Sizes {
            d_size,
            u_size: d.cfg.size_sectors,
            c_size: if d.size > 0 { d.size } else { d_size.min(nonzero_or_max(d.cfg.size_sectors)) },
            max_bio_size: crate::types::BIO_SIZE_MAX,
            queue_order_type: 0,
            dds_flags: DdsFlags::NONE,
            limits: Some(QueueLimits {
                physical_block_size: physical,
                logical_block_size: logical,
                alignment_offset: 0,
                io_min: logical,
                io_opt: 0,
                discard_enabled: u8::from(discard),
                discard_zeroes_data: 0,
                write_same_capable: 0,
                bm_block_shift: 0,
            }),
        };
        self.send_data(n, Some(v), Packet::Sizes(sizes));
    }

    pub(super) fn got_sizes(&mut self, n: NodeId, v: VolumeNr, s: &Sizes) {
        let bogus = (s.d_size != 0 && s.c_size > s.d_size) || (s.u_size != 0 && s.c_size > s.u_size);
        let handshaking = !self.st.connected(n);
        let Some(d) = self.devs.get(&v) else { return };
        let usable_data = self.st.disk(v) >= DiskState::Consistent;
        let peer_max = if s.d_size > 0 { s.d_size } else { u64::MAX };
        if bogus {
            return self.refuse(n, v, handshaking, "the peer announces impossible sizes");
        }
        if handshaking && usable_data && d.size > 0 && peer_max < d.size {
            let text = format!("The peer's disk size is too small! ({} < {} sectors)", peer_max, d.size);
            return self.refuse(n, v, handshaking, &text);
        }
        if handshaking && d.ldev.is_some() && self.st.disk(v) >= DiskState::Consistent && s.c_size > 0 {
            let usable = d.ldev.as_ref().map_or(0, |l| l.layout.usable_sectors);
            if s.c_size > usable {
                let text = format!(
                    "The own disk is too small for the peer's data ({usable} < {} sectors)",
                    s.c_size
                );
                return self.refuse(n, v, handshaking, &text);
            }
        }
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.d_size = s.d_size;
            p.u_size = s.u_size;
            p.c_size = s.c_size;
            p.peer_max_bio = s.max_bio_size;
            p.sizes_received = true;
        }
        self.determine_size(v);
    }

    fn refuse(&mut self, n: NodeId, v: VolumeNr, handshaking: bool, why: &str) {
        if handshaking {
            self.veto(n, v, Veto::Disconnect, why);
        } else {
            let scope = self.scope(Some(n), Some(v));
            self.log(LogLevel::Error, scope, why);
            self.disconnect_now(n);
        }
    }

    /// The size of the device: the smallest disk that counts (`spec/state-machine.md` §7.9).
    pub(crate) fn determine_size(&mut self, v: VolumeNr) {
        let Some(d) = self.devs.get(&v) else { return };
        let present: Vec<(NodeId, u64, u64, u64)> = self
            .pds
            .iter()
            .filter(|((_, pv), p)| *pv == v && p.sizes_received)
            .map(|((n, _), p)| (*n, p.d_size, p.c_size, p.u_size))
            .collect();
        let limit = present
            .iter()
            .map(|x| x.3)
            .chain([d.cfg.size_sectors])
            .filter(|s| *s > 0)
            .min()
            .unwrap_or(u64::MAX);
        let mut size;
        match &d.ldev {
            Some(l) => {
                size = l.layout.usable_sectors;
                for x in &present {
                    if x.1 > 0 {
                        size = size.min(x.1);
                    }
                }
                // A disk seen before and absent now still limits: its node could not follow a larger one.
                let absent = NodeId::all().any(|n| {
                    n != self.me
                        && l.sb.peers[n.idx()].flags.contains(PeerFlags::DEVICE_SEEN)
                        && !present.iter().any(|x| x.0 == n && x.1 > 0)
                });
                if absent && l.sb.effective_size_sectors > 0 {
                    size = size.min(l.sb.effective_size_sectors);
                }
                size = size.min(limit);
            }
            None => {
                size =
                    present.iter().flat_map(|x| [x.1, x.2, x.3]).filter(|s| *s > 0).min().unwrap_or(d.size);
            }
        }
        // Data in use never shrinks.
        if d.size > 0 && size < d.size && self.st.disk(v) >= DiskState::Consistent {
            size = d.size;
        }
        let up_to_date = self.st.disk(v) == DiskState::UpToDate
            || self.st.peers_of(v).any(|(n, p)| self.st.connected(n) && p.pdsk == DiskState::UpToDate);
        let changed = d.size != size;
        if let Some(d) = self.devs.get_mut(&v) {
            d.size = size;
            if let Some(l) = &mut d.ldev {
                if l.bitmap.sectors() != size && l.bitmap.resize(size, true).is_err() {
                    let scope = self.scope(None, Some(v));
                    self.log(LogLevel::Error, scope, "the bitmap cannot cover the device");
                    return;
                }
                if l.sb.effective_size_sectors != 0 || up_to_date {
                    l.sb.effective_size_sectors = size;
                }
            }
        }
        self.superblock_changed(v);
        let bytes = size * crate::types::SECTOR;
        if let Some(d) = self.devs.get_mut(&v)
            && d.told_size != Some(bytes)
        {
            d.told_size = Some(bytes);
            self.emit(Output::DeviceSize { vnr: v, size: bytes });
        }
        if changed {
            let scope = self.scope(None, Some(v));
            self.log(LogLevel::Info, scope, format!("size = {} KB", bytes / 1024));
            self.event(crate::io::Event::Device(v));
        }
    }
}

fn nonzero_or_max(x: u64) -> u64 {
    if x == 0 { u64::MAX } else { x }
}
