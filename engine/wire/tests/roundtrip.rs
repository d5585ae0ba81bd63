//! Every packet, with arbitrary contents, under every protocol version that changed a layout:
//! what is encoded is decoded to the same.
#![allow(clippy::unwrap_used, clippy::panic)]

use bytes::{Bytes, BytesMut};
use palisade_wire::*;
use proptest::prelude::*;

/// Arbitrary numbers from a seed.
struct Numbers(u64);

impl Numbers {
    fn u64(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn u32(&mut self) -> u32 {
        self.u64() as u32
    }

    fn below(&mut self, end: u64) -> u64 {
        self.u64() % end
    }

    fn sector(&mut self) -> u64 {
        self.below(SECTOR_MAX + 1)
    }

    /// A request size in bytes.
    fn blksize(&mut self, max: u32) -> u32 {
        (self.below(u64::from(max) / 512) as u32 + 1) * 512
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    fn alg(&mut self) -> AlgName {
        let longest = "x".repeat(63);
        AlgName::new(self.one_of(&["", "sha1", "crc32c", &longest])).unwrap()
    }

    fn bytes(&mut self, len: usize) -> Bytes {
        (0..len).map(|_| self.u64() as u8).collect()
    }
}

fn protocol(n: &mut Numbers, ctx: &DecodeCtx) -> Protocol {
    Protocol {
        protocol: n.one_of(WireProtocol::ALL),
        after_sb_0p: n.one_of(AfterSb::ALL),
        after_sb_1p: n.one_of(AfterSb::ALL),
        after_sb_2p: n.one_of(AfterSb::ALL),
        conn_flags: ConnFlags(n.u32()),
        two_primaries: n.below(2) == 1,
        integrity_alg: if ctx.apv >= 87 { n.alg() } else { AlgName::default() },
    }
}

fn sync_param(n: &mut Numbers, cmd: Cmd, ctx: &DecodeCtx) -> SyncParam {
    let fixed = cmd == Cmd::SyncParam89;
    let controller = fixed && ctx.apv >= 95;
    let mut number = |on: bool| if on { n.u32() } else { 0 };
    SyncParam {
        resync_rate: number(true),
        c_plan_ahead: number(controller),
        c_delay_target: number(controller),
        c_fill_target: number(controller),
        c_max_rate: number(controller),
        verify_alg: if fixed || ctx.apv >= 88 { n.alg() } else { AlgName::default() },
        csums_alg: if fixed { n.alg() } else { AlgName::default() },
    }
}

fn sizes(n: &mut Numbers, ctx: &DecodeCtx) -> Sizes {
    Sizes {
        d_size: n.sector(),
        u_size: n.sector(),
        c_size: n.sector(),
        max_bio_size: n.u32(),
        queue_order_type: n.u32() as u16,
        dds_flags: DdsFlags(n.u32() as u16),
        limits: ctx.features.contains(Features::WSAME).then(|| QueueLimits {
            physical_block_size: n.u32(),
            logical_block_size: n.u32(),
            alignment_offset: n.u32(),
            io_min: n.u32(),
            io_opt: n.u32(),
            discard_enabled: n.u32() as u8,
            discard_zeroes_data: n.u32() as u8,
            write_same_capable: n.u32() as u8,
            bm_block_shift: n.u32() as u8,
        }),
    }
}

fn uuids110(n: &mut Numbers) -> Uuids110 {
    let mask = n.u32() & n.u32();
    Uuids110 {
        current: n.u64(),
        dirty_bits: n.u64(),
        flags: UuidFlags(n.u64()),
        node_mask: n.u64(),
        bitmap_uuids: (0..32).filter(|node| mask >> node & 1 == 1).map(|node| (node, n.u64())).collect(),
        history: (0..n.below(33)).map(|_| n.u64()).collect(),
    }
}

fn state(n: &mut Numbers, ctx: &DecodeCtx) -> StateWord {
    // 8.4 has no number for Detaching.
    let disks = if ctx.apv < APV_V9 { &[DiskState::Diskless, DiskState::Failed][..] } else { DiskState::ALL };
    StateWord(n.u32())
        .with_role(n.one_of(Role::ALL))
        .with_peer(n.one_of(Role::ALL))
        .with_conn(n.below(24) as u8)
        .with_disk(n.one_of(disks))
        .with_pdsk(n.one_of(disks))
}

fn twopc(n: &mut Numbers, cmd: Cmd, ctx: &DecodeCtx) -> TwopcRequest {
    let v2 = ctx.features.contains(Features::TWOPC_V2);
    TwopcRequest {
        tid: n.u32(),
        flags: TwopcFlags(if v2 { n.u32() } else { 0 }),
        initiator: n.below(32) as u8,
        target: Some(n.below(33) as u8).filter(|node| *node < 32),
        nodes_to_reach: n.u64(),
        body: match cmd {
            Cmd::TwopcPrepare => TwopcBody::State { mask: StateWord(n.u32()), val: StateWord(n.u32()) },
            Cmd::TwopcPrepRsz => {
                TwopcBody::Resize { user_size: n.u64(), dds_flags: DdsFlags(n.u32() as u16) }
            }
            _ => TwopcBody::Verdict { primary_nodes: n.u64(), detail: n.u64() },
        },
    }
}

/// A packet of the kind `cmd` with arbitrary contents.
fn sample(cmd: Cmd, ctx: &DecodeCtx, n: &mut Numbers) -> Packet {
    let bio_max = max_bio_size(ctx.apv);
    let data = |n: &mut Numbers| Data {
        sector: n.sector(),
        block_id: n.u64(),
        seq_num: n.u32(),
        dp_flags: DpFlags(n.u32()),
    };
    let trim = |n: &mut Numbers| Trim {
        sector: n.sector(),
        block_id: n.u64(),
        seq_num: n.u32(),
        dp_flags: DpFlags(n.u32()),
        size: n.blksize(max_batch_size(ctx.features)),
    };
    let ack = |n: &mut Numbers| BlockAck {
        sector: n.sector(),
        block_id: n.u64(),
        blksize: n.u32(),
        seq_num: n.u32(),
    };
    let req =
        |n: &mut Numbers| BlockReq { sector: n.sector(), block_id: n.u64(), blksize: n.blksize(bio_max) };
    let dagtag_req = |n: &mut Numbers| DagtagReq {
        sector: n.sector(),
        block_id: n.u64(),
        blksize: n.blksize(bio_max),
        dagtag_node_id: n.u32(),
        dagtag: n.u64(),
    };
    let desc = |n: &mut Numbers| BlockDesc { sector: n.sector(), blksize: n.u32() };
    let state_req = |n: &mut Numbers| StateReq { mask: StateWord(n.u32()), val: StateWord(n.u32()) };
    let reply = |n: &mut Numbers| TwopcReply {
        tid: n.u32(),
        initiator: n.u32(),
        reachable_nodes: n.u64(),
        primary_nodes: n.u64(),
        weak_nodes: n.u64(),
    };
    let enable = |n: &mut Numbers| EnableReplication { enable: n.below(2) == 1 };
    match cmd {
        Cmd::Data => Packet::Data(data(n)),
        Cmd::DataReply => Packet::DataReply(data(n)),
        Cmd::RsDataReply => Packet::RsDataReply(data(n)),
        Cmd::Barrier => Packet::Barrier(Barrier { barrier: n.u32() }),
        Cmd::Bitmap => Packet::Bitmap,
        Cmd::UnplugRemote => Packet::UnplugRemote,
        Cmd::DataRequest => Packet::DataRequest(req(n)),
        Cmd::RsDataRequest => Packet::RsDataRequest(req(n)),
        Cmd::SyncParam => Packet::SyncParam(sync_param(n, cmd, ctx)),
        Cmd::Protocol => Packet::Protocol(protocol(n, ctx)),
        Cmd::Uuids => Packet::Uuids(Uuids {
            current: n.u64(),
            bitmap: n.u64(),
            history: [n.u64(), n.u64()],
            dirty_bits: n.u64(),
            flags: UuidFlags(n.u64()),
        }),
        Cmd::Sizes => Packet::Sizes(sizes(n, ctx)),
        Cmd::State => Packet::State(state(n, ctx)),
        Cmd::SyncUuid => Packet::SyncUuid(SyncUuid { uuid: n.u64() }),
        Cmd::AuthChallenge => Packet::AuthChallenge,
        Cmd::AuthResponse => Packet::AuthResponse,
        Cmd::StateChgReq => Packet::StateChgReq(state_req(n)),
        Cmd::Ping => Packet::Ping,
        Cmd::PingAck => Packet::PingAck,
        Cmd::RecvAck => Packet::RecvAck(ack(n)),
        Cmd::WriteAck => Packet::WriteAck(ack(n)),
        Cmd::RsWriteAck => Packet::RsWriteAck(ack(n)),
        Cmd::Superseded => Packet::Superseded(ack(n)),
        Cmd::NegAck => Packet::NegAck(ack(n)),
        Cmd::NegDreply => Packet::NegDreply(ack(n)),
        Cmd::NegRsDreply => Packet::NegRsDreply(ack(n)),
        Cmd::BarrierAck => Packet::BarrierAck(BarrierAck { barrier: n.u32(), set_size: n.u32() }),
        Cmd::StateChgReply => Packet::StateChgReply(StateReply(n.u32().cast_signed())),
        Cmd::OvRequest => Packet::OvRequest(req(n)),
        Cmd::OvReply => Packet::OvReply(req(n)),
        Cmd::OvResult => Packet::OvResult(ack(n)),
        Cmd::CsumRsRequest => Packet::CsumRsRequest(req(n)),
        Cmd::RsIsInSync => Packet::RsIsInSync(ack(n)),
        Cmd::SyncParam89 => Packet::SyncParam89(sync_param(n, cmd, ctx)),
        Cmd::CompressedBitmap => {
            Packet::CompressedBitmap(CompressedBitmap { encoding: n.u32() as u8 & 0xf0 | 2 })
        }
        Cmd::DelayProbe => Packet::DelayProbe(DelayProbe { seq_num: n.u32(), offset: n.u32() }),
        Cmd::OutOfSync => Packet::OutOfSync(desc(n)),
        Cmd::RsCancel => Packet::RsCancel(ack(n)),
        Cmd::ConnStChgReq => Packet::ConnStChgReq(state_req(n)),
        Cmd::ConnStChgReply => Packet::ConnStChgReply(StateReply(n.u32().cast_signed())),
        Cmd::RetryWrite => Packet::RetryWrite(ack(n)),
        Cmd::ProtocolUpdate => Packet::ProtocolUpdate(protocol(n, ctx)),
        Cmd::TwopcPrepare => Packet::TwopcPrepare(twopc(n, cmd, ctx)),
        Cmd::TwopcAbort => Packet::TwopcAbort(twopc(n, cmd, ctx)),
        Cmd::Dagtag => Packet::Dagtag(Dagtag { dagtag: n.u64() }),
        Cmd::Trim => Packet::Trim(trim(n)),
        Cmd::RsThinReq => Packet::RsThinReq(req(n)),
        Cmd::RsDeallocated => Packet::RsDeallocated(desc(n)),
        Cmd::Wsame => Packet::Wsame(trim(n)),
        Cmd::TwopcPrepRsz => Packet::TwopcPrepRsz(twopc(n, cmd, ctx)),
        Cmd::Zeroes => Packet::Zeroes(trim(n)),
        Cmd::PeerAck => Packet::PeerAck(PeerAck { mask: n.u64(), dagtag: n.u64() }),
        Cmd::PeersInSync => {
            Packet::PeersInSync(PeersInSync { sector: n.sector(), mask: n.u64(), size: n.u32() })
        }
        Cmd::Uuids110 => Packet::Uuids110(uuids110(n)),
        Cmd::PeerDagtag => Packet::PeerDagtag(PeerDagtag { dagtag: n.u64(), node_id: n.u32() }),
        Cmd::CurrentUuid => Packet::CurrentUuid(CurrentUuid { uuid: n.u64(), weak_nodes: n.u64() }),
        Cmd::TwopcYes => Packet::TwopcYes(reply(n)),
        Cmd::TwopcNo => Packet::TwopcNo(reply(n)),
        Cmd::TwopcCommit => Packet::TwopcCommit(twopc(n, cmd, ctx)),
        Cmd::TwopcRetry => Packet::TwopcRetry(reply(n)),
        Cmd::ConfirmStable => Packet::ConfirmStable(ConfirmStable {
            oldest_block_id: n.u64(),
            youngest_block_id: n.u64(),
            set_size: n.u32(),
        }),
        Cmd::RsCancelAhead => Packet::RsCancelAhead(ack(n)),
        Cmd::Disconnect => Packet::Disconnect,
        Cmd::RsDagtagReq => Packet::RsDagtagReq(dagtag_req(n)),
        Cmd::RsCsumDagtagReq => Packet::RsCsumDagtagReq(dagtag_req(n)),
        Cmd::RsThinDagtagReq => Packet::RsThinDagtagReq(dagtag_req(n)),
        Cmd::OvDagtagReq => Packet::OvDagtagReq(dagtag_req(n)),
        Cmd::OvDagtagReply => Packet::OvDagtagReply(dagtag_req(n)),
        Cmd::WriteAckInSync => Packet::WriteAckInSync(ack(n)),
        Cmd::RsNegAck => Packet::RsNegAck(ack(n)),
        Cmd::OvResultId => Packet::OvResultId(VerifyResult {
            sector: n.sector(),
            block_id: n.u64(),
            blksize: n.u32(),
            seq_num: n.u32(),
            result: n.u32(),
        }),
        Cmd::RsDeallocatedId => Packet::RsDeallocatedId(ack(n)),
        Cmd::FlushRequests => Packet::FlushRequests(FlushRequests { flush_sequence: n.u64() }),
        Cmd::FlushForward => {
            Packet::FlushForward(FlushForward { flush_sequence: n.u64(), initiator_node_id: n.u32() })
        }
        Cmd::FlushRequestsAck => {
            Packet::FlushRequestsAck(FlushAck { flush_sequence: n.u64(), primary_node_id: n.u32() })
        }
        Cmd::EnableReplicationNext => Packet::EnableReplicationNext(enable(n)),
        Cmd::EnableReplication => Packet::EnableReplication(enable(n)),
        Cmd::InitialMeta => Packet::InitialMeta,
        Cmd::InitialData => Packet::InitialData,
        Cmd::ConnectionFeatures => Packet::ConnectionFeatures(ConnectionFeatures {
            protocol_min: n.u32(),
            features: Features(n.u32()),
            protocol_max: n.u32(),
            sender_node_id: n.u32(),
            receiver_node_id: n.u32(),
        }),
    }
}

/// Lengths of digest and bulk data that fit the packet.
fn tail(cmd: Cmd, ctx: &DecodeCtx, n: &mut Numbers) -> (usize, usize) {
    match cmd.tail() {
        Tail::Nothing => (0, 0),
        Tail::Block => (ctx.data_digest_len, 512 * (1 + n.below(8) as usize)),
        Tail::CsumsDigest => (ctx.csums_digest_len, 0),
        Tail::VerifyDigest => (ctx.verify_digest_len, 0),
        Tail::Response => (1 + n.below(64) as usize, 0),
        Tail::Challenge => (0, 64),
        Tail::Words => (0, 8 * n.below(511) as usize),
        Tail::Code => (0, 1 + n.below(4000) as usize),
    }
}

const FEATURES: [Features; 3] = [Features::V84, Features::V9_2_18, Features::ALL];

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_packet(seed in any::<u64>()) {
        let mut n = Numbers(seed);
        let mut agreed = std::collections::BTreeSet::new();
        for apv in [86, 87, 88, 89, 94, 95, 99, 100, 101, 110, 112, 118, 121, 122, 124] {
            for features in FEATURES {
                let ctx = DecodeCtx {
                    apv,
                    features,
                    data_digest_len: n.one_of(&[0, 4, 20]),
                    verify_digest_len: 20,
                    csums_digest_len: 4,
                };
                for cmd in Cmd::ALL.iter().copied().filter(|cmd| cmd.is_agreed(&ctx)) {
                    agreed.insert(cmd);
                    one_packet(cmd, &ctx, &mut n);
                }
            }
        }
        prop_assert_eq!(agreed.len(), Cmd::ALL.len());
    }
}

fn one_packet(cmd: Cmd, ctx: &DecodeCtx, n: &mut Numbers) {
    let packet = sample(cmd, ctx, n);
    assert_eq!(packet.cmd(), cmd);
    assert_eq!(Cmd::from_u16(cmd.number()), Some(cmd));
    let (digest_len, bulk_len) = tail(cmd, ctx, n);
    let (digest, bulk) = (n.bytes(digest_len), n.bytes(bulk_len));
    let volume = Some(n.below(0xffff) as u16).filter(|volume| volume % 2 == 0);
    let mut out = BytesMut::from(&b"before"[..]);
    encode(&packet, volume, ctx, &digest, bulk.len(), &mut out).unwrap();
    let mut wire = out.freeze().slice(6..).to_vec();
    wire.extend_from_slice(&bulk);

    let header = decode_header(&wire).unwrap().unwrap();
    assert_eq!(header.cmd, cmd);
    if header.kind == HeaderKind::H100 {
        assert_eq!(header.volume, volume);
    }
    assert_eq!(header.length as usize, wire.len() - header.header_len);
    let payload = Bytes::from(wire).slice(header.header_len..);
    let streams = [Stream::Data, Stream::Control];
    let allowed = match cmd.streams() {
        Streams::Data => &streams[..1],
        Streams::Control => &streams[1..],
        Streams::Both => &streams[..],
    };
    for stream in streams {
        let decoded = decode(&header, payload.clone(), stream, ctx);
        if allowed.contains(&stream) {
            assert_eq!(decoded.unwrap(), (packet.clone(), digest.clone(), bulk.clone()));
            let fixed = payload.slice(..fixed_len(&header, ctx).unwrap());
            assert_eq!(fixed.len(), payload.len() - bulk.len());
            let decoded = decode_fixed(&header, fixed, stream, ctx).unwrap();
            assert_eq!(decoded, (packet.clone(), digest.clone()));
        } else {
            assert_eq!(decoded, Err(WireError::WrongStream { cmd, stream }));
        }
    }
}
