//! The worked examples of the specification (§12), byte for byte in both directions.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "common/examples.rs"]
mod examples;

use bytes::{Bytes, BytesMut};
use examples::{EXAMPLES, bytes};
use palisade_wire::*;

fn ctx(apv: u32, features: u32) -> DecodeCtx {
    DecodeCtx { apv, features: Features(features), ..DecodeCtx::initial() }
}

fn expected(section: &str) -> Packet {
    let uuid = 0x1111_2222_3333_4444;
    let writer_id = 0x40e2_018c_80a0_ffff;
    let target_id = 0x80c4_327a_80a0_ffff;
    let features = |features, protocol_max, receiver_node_id| {
        Packet::ConnectionFeatures(ConnectionFeatures {
            protocol_min: 86,
            features,
            protocol_max,
            sender_node_id: 0,
            receiver_node_id,
        })
    };
    let sizes = |discard_enabled| {
        Packet::Sizes(Sizes {
            d_size: 2_097_152,
            u_size: 0,
            c_size: 2_097_152,
            max_bio_size: 1 << 20,
            queue_order_type: 0,
            dds_flags: DdsFlags::NONE,
            limits: Some(QueueLimits {
                physical_block_size: 512,
                logical_block_size: 512,
                alignment_offset: 0,
                io_min: 512,
                io_opt: 0,
                discard_enabled,
                discard_zeroes_data: 0,
                write_same_capable: 0,
                bm_block_shift: 0,
            }),
        })
    };
    let handshake = StateWord::default()
        .with_role(Role::Secondary)
        .with_conn(ConnState::Connecting.as_u8())
        .with_disk(DiskState::UpToDate)
        .with_pdsk(DiskState::DUnknown);
    let request = |body| TwopcRequest {
        tid: 0x5a17_c3d1,
        flags: TwopcFlags::HAS_FLAGS | TwopcFlags::HAS_REACHABLE,
        initiator: 0,
        target: Some(1),
        nodes_to_reach: !3,
        body,
    };
    let ack = |sector, block_id, blksize, seq_num| BlockAck { sector, block_id, blksize, seq_num };
    let data = |sector, block_id, seq_num, dp_flags| Data { sector, block_id, seq_num, dp_flags };
    match section {
        "12.1 data socket" => Packet::InitialData,
        "12.1 control socket" => Packet::InitialMeta,
        "12.1 features" => features(Features::V84, 101, 0),
        "12.2 features" => features(Features::ALL, 124, 1),
        "12.1 protocol" | "12.2 protocol" => Packet::Protocol(Protocol {
            protocol: WireProtocol::C,
            after_sb_0p: AfterSb::Disconnect,
            after_sb_1p: AfterSb::Disconnect,
            after_sb_2p: AfterSb::Disconnect,
            conn_flags: ConnFlags::NONE,
            two_primaries: false,
            integrity_alg: AlgName::default(),
        }),
        "12.1 sync param" => Packet::SyncParam89(SyncParam {
            resync_rate: 250,
            c_plan_ahead: 20,
            c_delay_target: 10,
            c_fill_target: 100,
            c_max_rate: 102_400,
            ..SyncParam::default()
        }),
        "12.1 sizes" => sizes(0),
        "12.2 sizes" => sizes(1),
        "12.1 uuids" => Packet::Uuids(Uuids {
            current: uuid,
            bitmap: 0,
            history: [0; 2],
            dirty_bits: 0,
            flags: UuidFlags::NONE,
        }),
        "12.1 state" => Packet::State(handshake),
        "12.2 state" => Packet::State(handshake.with_quorum(true)),
        "12.2 prepare" => Packet::TwopcPrepare(request(TwopcBody::State {
            mask: StateWord(StateWord::CONN_MASK | StateWord::ROLE_MASK),
            val: StateWord::default().with_conn(9).with_role(Role::Secondary),
        })),
        "12.2 commit" => Packet::TwopcCommit(request(TwopcBody::Verdict { primary_nodes: 0, detail: 3 })),
        "12.2 ping" => Packet::Ping,
        "12.2 enable replication" => Packet::EnableReplicationNext(EnableReplication { enable: true }),
        "12.2 uuids" => Packet::Uuids110(Uuids110 {
            current: uuid,
            dirty_bits: 0,
            flags: UuidFlags::STABLE,
            node_mask: 0,
            bitmap_uuids: vec![(1, 0)],
            history: vec![0; 32],
        }),
        "12.2 yes" => Packet::TwopcYes(TwopcReply {
            tid: 0x5a17_c3d1,
            initiator: 0,
            reachable_nodes: 3,
            primary_nodes: 0,
            weak_nodes: 0,
        }),
        "12.3 dagtag" => Packet::Dagtag(Dagtag { dagtag: 0x1000 }),
        "12.3 write" => Packet::Data(data(2048, writer_id, 1, DpFlags::SEND_WRITE_ACK | DpFlags::RW_SYNC)),
        "12.3 write ack" => Packet::WriteAck(ack(2048, writer_id, 4096, 1)),
        "12.3 barrier" => Packet::Barrier(Barrier { barrier: 0x0700_0000 }),
        "12.3 barrier ack" => Packet::BarrierAck(BarrierAck { barrier: 0x0700_0000, set_size: 1 }),
        "12.3 peer ack" => Packet::PeerAck(PeerAck { mask: 3, dagtag: 0x1008 }),
        "12.4 request" => Packet::RsDagtagReq(DagtagReq {
            sector: 4096,
            block_id: target_id,
            blksize: 32768,
            dagtag_node_id: 0,
            dagtag: 0x1008,
        }),
        "12.4 reply" => Packet::RsDataReply(data(4096, target_id, 0, DpFlags::NONE)),
        "12.4 ack" => Packet::RsWriteAck(ack(4096, target_id, 32768, 2)),
        "12.4 request 8.4" => {
            Packet::RsDataRequest(BlockReq { sector: 4096, block_id: ID_SYNCER, blksize: 32768 })
        }
        "12.4 reply 8.4" => Packet::RsDataReply(data(4096, ID_SYNCER, 0, DpFlags::NONE)),
        "12.4 ack 8.4" => Packet::RsWriteAck(ack(4096, ID_SYNCER, 32768, 1)),
        "12.5 bitmap" => Packet::CompressedBitmap(CompressedBitmap { encoding: 0x72 }),
        other => panic!("no expectation for {other}"),
    }
}

#[test]
fn byte_for_byte() {
    for (section, stream, apv, features, text, bulk_len) in EXAMPLES {
        let ctx = ctx(*apv, *features);
        let mut wire = bytes(text);
        let header = decode_header(&wire).unwrap().unwrap();
        let (packet, volume) = (expected(section), header.volume);

        let mut out = BytesMut::new();
        encode(&packet, volume, &ctx, &[], *bulk_len, &mut out).unwrap();
        assert_eq!(out, wire, "{section}");

        let bulk: Bytes = vec![0xa5; *bulk_len].into();
        wire.extend_from_slice(&bulk);
        let payload = Bytes::from(wire).slice(header.header_len..);
        let decoded = decode(&header, payload, *stream, &ctx).unwrap();
        assert_eq!(decoded, (packet, Bytes::new(), bulk), "{section}");
    }
}

#[test]
fn bitmaps() {
    use palisade_wire::bitmap::{Progress, Receiver, Sender};
    // §12.5: bits 100..199 of 262144.
    let run_at = |bit: u64| match bit {
        0..100 => (false, 100 - bit),
        100..200 => (true, 200 - bit),
        _ => (false, u64::MAX),
    };
    let mut sender = Sender::new(262_144, HeaderKind::H100, true);
    let (packet, code) = sender.next_packet(run_at, |_| 0).unwrap();
    assert_eq!(packet, expected("12.5 bitmap"));
    assert_eq!(code[..], [0xdf, 0xcc, 0x37, 0xf3, 0x77, 0xe0, 0x3d, 0x00]);
    assert_eq!(sender.next_packet(run_at, |_| 0), None);

    // The second check vector: 64 bits, runs of 5 set, 3 clear, 56 set.
    let mut runs = Vec::new();
    let mut receiver = Receiver::new(64, HeaderKind::H100);
    let done = receiver.compressed(0xa2, &[0x23, 0xdf, 0x01], |first, count| runs.push((first, count)));
    assert_eq!((done, runs), (Ok(Progress::Done), vec![(0, 5), (8, 56)]));
    let bit = |bit: u64| (!(5..8).contains(&bit), 1);
    let (packet, code) = Sender::new(64, HeaderKind::H100, true).next_packet(bit, |_| 0).unwrap();
    assert_eq!(packet, Packet::CompressedBitmap(CompressedBitmap { encoding: 0xa2 }));
    assert_eq!(code[..], [0x23, 0xdf, 0x01]);
}
