//! What is refused: from the header alone, from a field, and when encoding (§3, §13).

use bytes::{Bytes, BytesMut};
use palisade_wire::*;

const V84: DecodeCtx = DecodeCtx { apv: 101, features: Features::V84, ..DecodeCtx::initial() };
const V9: DecodeCtx = DecodeCtx { apv: 124, features: Features::ALL, ..DecodeCtx::initial() };

fn header(cmd: Cmd, length: u32) -> Header {
    Header { kind: HeaderKind::H100, volume: Some(0), cmd, length, header_len: 16 }
}

fn payload(cmd: Cmd, stream: Stream, ctx: &DecodeCtx, bytes: &[u8]) -> Result<Packet, WireError> {
    let header = header(cmd, bytes.len() as u32);
    decode(&header, Bytes::copy_from_slice(bytes), stream, ctx).map(|(packet, ..)| packet)
}

fn is_length(result: &Result<(), WireError>) -> bool {
    matches!(result, Err(WireError::Length { .. }))
}

#[test]
fn lengths_are_known_from_the_header() {
    let check = |cmd, length, ctx: &DecodeCtx| check_header(&header(cmd, length), Stream::Data, ctx);
    // Data: at most 1 MiB, whole sectors.
    assert_eq!(check(Cmd::Data, 24 + (1 << 20), &V9), Ok(()));
    for length in [0, 23, 24, 24 + 511, 24 + (1 << 20) + 512, u32::MAX] {
        assert!(is_length(&check(Cmd::Data, length, &V9)), "{length}");
    }
    // A digest belongs to the length.
    let with_digest = DecodeCtx { data_digest_len: 20, ..V9 };
    assert!(is_length(&check(Cmd::Data, 24 + 512, &with_digest)));
    assert_eq!(check(Cmd::Data, 24 + 20 + 512, &with_digest), Ok(()));
    // P_ZEROES never has one (§6.4).
    assert_eq!(check(Cmd::Zeroes, 28, &with_digest), Ok(()));
    // Bitmap packets fill at most 4096 bytes with their header (§8.2).
    assert_eq!(check(Cmd::Bitmap, 4080, &V9), Ok(()));
    assert!(is_length(&check(Cmd::Bitmap, 4088, &V9)) && is_length(&check(Cmd::Bitmap, 12, &V9)));
    assert_eq!(check(Cmd::CompressedBitmap, 4080, &V9), Ok(()));
    assert!(is_length(&check(Cmd::CompressedBitmap, 4081, &V9)));
    assert!(is_length(&check(Cmd::CompressedBitmap, 1, &V9)));
    // P_SIZES depends on what was agreed (§4.7).
    assert_eq!(check(Cmd::Sizes, 56, &V9), Ok(()));
    assert!(is_length(&check(Cmd::Sizes, 32, &V9)));
    let plain = DecodeCtx { features: Features::TRIM, ..V84 };
    assert_eq!(check(Cmd::Sizes, 32, &plain), Ok(()));
    // A challenge has 64 bytes; 8.4 accepts more (§4.3).
    assert!(is_length(&check(Cmd::AuthChallenge, 65, &V9)));
    assert_eq!(check(Cmd::AuthChallenge, 128, &V84), Ok(()));
    assert!(is_length(&check(Cmd::AuthChallenge, 129, &V84)));
    // No payload where none is allowed.
    assert!(is_length(&check(Cmd::Disconnect, 1, &V9)));
    for cmd in Cmd::ALL.iter().filter(|cmd| cmd.is_agreed(&V9)) {
        assert!(max_payload(*cmd, &V9) <= (1 << 20) + 64, "{cmd}");
    }
}

#[test]
fn a_missing_algorithm_never_matches() {
    // Otherwise an empty digest would equal an empty digest and the block count as in sync.
    for cmd in [Cmd::CsumRsRequest, Cmd::OvReply] {
        let result = check_header(&header(cmd, 24), Stream::Data, &V84);
        assert!(matches!(result, Err(WireError::NotAgreed { .. })), "{cmd}");
    }
    let ctx = DecodeCtx { csums_digest_len: 4, ..V84 };
    assert!(is_length(&check_header(&header(Cmd::CsumRsRequest, 24), Stream::Data, &ctx)));
    assert_eq!(check_header(&header(Cmd::CsumRsRequest, 28), Stream::Data, &ctx), Ok(()));
}

#[test]
fn what_was_not_agreed_is_refused() {
    let refused = |cmd, stream, ctx: &DecodeCtx| {
        let length = min_payload(cmd, ctx) as u32;
        matches!(check_header(&header(cmd, length), stream, ctx), Err(WireError::NotAgreed { .. }))
    };
    for cmd in [Cmd::Uuids, Cmd::SyncUuid, Cmd::StateChgReq, Cmd::ConnStChgReq, Cmd::SyncParam] {
        assert!(refused(cmd, Stream::Data, &V9), "{cmd}");
    }
    for cmd in [Cmd::Uuids110, Cmd::TwopcPrepare, Cmd::Dagtag, Cmd::Disconnect, Cmd::EnableReplication] {
        assert!(refused(cmd, Stream::Data, &V84), "{cmd}");
    }
    assert!(refused(Cmd::OvResult, Stream::Control, &V9));
    assert!(refused(Cmd::PeerAck, Stream::Control, &V84));
    let no_trim = DecodeCtx { features: Features::NONE, ..V84 };
    assert!(refused(Cmd::Trim, Stream::Data, &no_trim));
}

#[test]
fn versions_of_the_packet_table() {
    let agreed = |cmd: Cmd, apv| cmd.is_agreed(&DecodeCtx { apv, ..V9 });
    let since = [
        (88, &[Cmd::OvRequest, Cmd::OvReply, Cmd::OvResult][..]),
        (89, &[Cmd::CsumRsRequest, Cmd::RsIsInSync, Cmd::SyncParam89]),
        (90, &[Cmd::CompressedBitmap]),
        (96, &[Cmd::OutOfSync]),
        (100, &[Cmd::ConnStChgReq, Cmd::ConnStChgReply, Cmd::RetryWrite, Cmd::ProtocolUpdate]),
        (110, &[Cmd::TwopcPrepare, Cmd::TwopcAbort, Cmd::TwopcCommit, Cmd::TwopcYes, Cmd::TwopcNo]),
        (110, &[Cmd::TwopcRetry, Cmd::Dagtag, Cmd::PeerAck, Cmd::PeersInSync, Cmd::Uuids110]),
        (110, &[Cmd::PeerDagtag, Cmd::CurrentUuid]),
        (112, &[Cmd::TwopcPrepRsz]),
        (114, &[Cmd::ConfirmStable]),
        (115, &[Cmd::RsCancelAhead]),
        (118, &[Cmd::Disconnect]),
        (122, &[Cmd::WriteAckInSync, Cmd::RsNegAck, Cmd::OvResultId, Cmd::RsDeallocatedId]),
        (123, &[Cmd::FlushRequests, Cmd::FlushForward, Cmd::FlushRequestsAck]),
    ];
    for (apv, cmds) in since {
        for cmd in cmds {
            assert!(agreed(*cmd, apv) && !agreed(*cmd, apv - 1), "{cmd}");
        }
    }
    let until = [
        (89, &[Cmd::SyncParam][..]),
        (110, &[Cmd::Uuids, Cmd::SyncUuid, Cmd::StateChgReq, Cmd::StateChgReply]),
        (110, &[Cmd::ConnStChgReq, Cmd::ConnStChgReply]),
        (122, &[Cmd::OvResult, Cmd::RsDeallocated]),
    ];
    for (apv, cmds) in until {
        for cmd in cmds {
            assert!(agreed(*cmd, apv - 1) && !agreed(*cmd, apv), "{cmd}");
        }
    }
    let features = [
        (Features::TRIM, &[Cmd::Trim][..]),
        (Features::THIN_RESYNC, &[Cmd::RsThinReq, Cmd::RsDeallocatedId]),
        (Features::WSAME, &[Cmd::Wsame]),
        (Features::WZEROES, &[Cmd::Zeroes]),
        (Features::RESYNC_DAGTAG, &[Cmd::RsDagtagReq, Cmd::RsCsumDagtagReq, Cmd::RsThinDagtagReq]),
        (Features::RESYNC_DAGTAG, &[Cmd::OvDagtagReq, Cmd::OvDagtagReply]),
        (Features::RESYNC_WITHOUT_REPLICATION, &[Cmd::EnableReplication, Cmd::EnableReplicationNext]),
    ];
    for (feature, cmds) in features {
        for cmd in cmds {
            assert!(cmd.is_agreed(&V9), "{cmd}");
            let without = DecodeCtx { features: Features::ALL.with(feature, false), ..V9 };
            assert!(!cmd.is_agreed(&without), "{cmd}");
        }
    }
}

#[test]
fn header_types() {
    let h80 = |cmd| Header { kind: HeaderKind::H80, volume: Some(0), cmd, length: 0, header_len: 8 };
    // Strict on the data stream, any on the control stream (§2.7, §3).
    let result = check_header(&h80(Cmd::UnplugRemote), Stream::Data, &V9);
    assert!(matches!(result, Err(WireError::WrongHeader { .. })));
    assert_eq!(check_header(&h80(Cmd::PingAck), Stream::Control, &V9), Ok(()));
    let early = header(Cmd::Ping, 0);
    assert_eq!(check_header(&early, Stream::Control, &DecodeCtx::initial()), Ok(()));
    // A raised minimum version makes a kernel send its features with h100 (§3).
    assert_eq!(
        check_header(&header(Cmd::ConnectionFeatures, 72), Stream::Data, &DecodeCtx::initial()),
        Ok(())
    );
    let initial = check_header(&header(Cmd::InitialData, 0), Stream::Data, &V9);
    assert!(matches!(initial, Err(WireError::WrongHeader { .. })));
}

#[test]
fn fields_without_meaning() {
    let invalid = |result: Result<Packet, WireError>, name: &str| match result {
        Err(WireError::Field { field, .. } | WireError::Name { field, .. }) => assert_eq!(field, name),
        other => panic!("{other:?} instead of an error about {name}"),
    };
    // A disk state 10, a state 24, a role 3.
    for word in [10u32 << 9, 24 << 4, 3] {
        invalid(payload(Cmd::State, Stream::Data, &V9, &word.to_be_bytes()), "state");
    }
    assert_eq!(
        payload(Cmd::State, Stream::Data, &V84, &(8u32 << 9).to_be_bytes()),
        Ok(Packet::State(StateWord::default().with_disk(DiskState::UpToDate)))
    );
    // A sector whose byte offset is no offset, sizes that are no size.
    let mut request = [0u8; 24];
    request[16..20].copy_from_slice(&4096u32.to_be_bytes());
    assert!(payload(Cmd::DataRequest, Stream::Data, &V9, &request).is_ok());
    request[..8].copy_from_slice(&SECTOR_MAX.to_be_bytes());
    assert!(payload(Cmd::DataRequest, Stream::Data, &V9, &request).is_ok());
    request[..8].copy_from_slice(&(SECTOR_MAX + 1).to_be_bytes());
    invalid(payload(Cmd::DataRequest, Stream::Data, &V9, &request), "sector");
    request[..8].fill(0);
    for blksize in [0u32, 511, (1 << 20) + 512] {
        request[16..20].copy_from_slice(&blksize.to_be_bytes());
        invalid(payload(Cmd::DataRequest, Stream::Data, &V9, &request), "size");
    }
    // Bitmap UUIDs of nodes above 31, and fewer UUIDs than announced.
    let mut uuids = [0u8; 48];
    uuids[35] = 1;
    invalid(payload(Cmd::Uuids110, Stream::Data, &V9, &uuids), "bitmap_uuids_mask");
    uuids[35] = 0;
    uuids[39] = 3;
    assert!(matches!(
        payload(Cmd::Uuids110, Stream::Data, &V9, &uuids),
        Err(WireError::Incomplete { announced: 56, given: 48, .. })
    ));
    invalid(payload(Cmd::Uuids110, Stream::Data, &V9, &[0; 45]), "history length");
    // Names without end, with strange characters.
    invalid(payload(Cmd::Protocol, Stream::Data, &V9, &[0; 25]), "protocol");
    let mut protocol = [0u8; 28];
    protocol[3] = 3;
    protocol[24..].copy_from_slice(b"md5\0");
    assert!(payload(Cmd::Protocol, Stream::Data, &V9, &protocol).is_ok());
    protocol[27] = b'x';
    invalid(payload(Cmd::Protocol, Stream::Data, &V9, &protocol), "integrity_alg");
    protocol[24..].copy_from_slice(b"\xffd5\0");
    invalid(payload(Cmd::Protocol, Stream::Data, &V9, &protocol), "integrity_alg");
    // Node ids.
    let mut request = [0u8; 36];
    request[11] = 32;
    invalid(payload(Cmd::TwopcPrepare, Stream::Data, &V9, &request), "target");
    request[11] = 0xff;
    assert!(payload(Cmd::TwopcPrepare, Stream::Data, &V9, &request).is_ok());
    request[10] = 0xff;
    invalid(payload(Cmd::TwopcPrepare, Stream::Data, &V9, &request), "initiator");
    // An unknown bitmap code.
    invalid(payload(Cmd::CompressedBitmap, Stream::Data, &V9, &[0x03, 0x00]), "encoding");
}

#[test]
fn encoding_refuses_what_a_peer_would_refuse() {
    let refused = |packet: Packet, digest: &[u8], bulk_len: usize| {
        let mut out = BytesMut::from(&b"x"[..]);
        let result = encode(&packet, None, &V9, digest, bulk_len, &mut out);
        assert_eq!(&out[..], b"x", "nothing is left behind");
        result.unwrap_err()
    };
    let data = Data { sector: 0, block_id: 1, seq_num: 1, dp_flags: DpFlags::NONE };
    assert!(matches!(refused(Packet::Data(data), &[], 100), WireError::Length { .. }));
    assert!(matches!(refused(Packet::Data(data), &[], usize::MAX), WireError::Length { .. }));
    assert!(matches!(refused(Packet::Data(data), &[1; 4], 512), WireError::Length { .. }));
    assert!(matches!(refused(Packet::Ping, &[], 1), WireError::Length { .. }));
    assert!(matches!(refused(Packet::SyncUuid(SyncUuid { uuid: 1 }), &[], 0), WireError::NotAgreed { .. }));
    assert!(matches!(refused(Packet::State(StateWord(3)), &[], 0), WireError::Field { .. }));
    for bitmap_uuids in [vec![(32, 1)], vec![(3, 1), (3, 2)]] {
        let uuids = Uuids110 { bitmap_uuids, ..Uuids110::default() };
        assert!(matches!(refused(Packet::Uuids110(uuids), &[], 0), WireError::Field { .. }));
    }
    let history = Uuids110 { history: vec![0; 33], ..Uuids110::default() };
    assert!(matches!(refused(Packet::Uuids110(history), &[], 0), WireError::Field { .. }));
    assert_eq!(AlgName::new(&"x".repeat(64)), None);
    assert_eq!(AlgName::new("two words"), None);
}

#[test]
fn data_is_not_copied() {
    let wire = Bytes::from(vec![0u8; 24 + 4 + 512]);
    let ctx = DecodeCtx { data_digest_len: 4, ..V9 };
    let header = header(Cmd::Data, wire.len() as u32);
    let (_, digest, bulk) = decode(&header, wire.clone(), Stream::Data, &ctx).unwrap();
    assert_eq!(digest.as_ptr(), wire[24..].as_ptr());
    assert_eq!(bulk.as_ptr(), wire[28..].as_ptr());
}

#[test]
fn errors_are_sentences() {
    let error = check_header(&header(Cmd::Ping, 0), Stream::Data, &V9).unwrap_err();
    assert_eq!(error.to_string(), "The peer sent P_PING on the data stream, where it is not allowed.");
}
