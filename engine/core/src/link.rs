//! A link to a peer: features, authentication, pings, and who gets which packet
//! (`spec/wire-protocol.md` §4).

use crate::auth;
use crate::connection::{Phase, Veto};
use crate::core::{Core, Todo};
use crate::io::{CodecCtx, LinkError, LogLevel, Output, Stream};
use crate::tables::refusal::Refusal;
use crate::tables::split_brain::RrConflict;
use crate::twopc::{Answer, Change, Operation, Stage};
use crate::types::{NodeId, Time, VolumeNr};
use bytes::Bytes;
use palisade_wire::enums::{ConnState, Role};
use palisade_wire::{AlgName, ConnFlags, ConnectionFeatures, Features, Packet, Protocol};
use std::time::Duration;

/// Oldest protocol spoken: DRBD 9 as current kernels accept it.
pub const APV_MIN: u32 = 118;
/// Newest protocol spoken.
pub const APV_MAX: u32 = 124;
/// Features offered: the set of 9.2.18.
pub const FEATURES: Features = Features::V9_2_19;

impl Core {
    pub(crate) fn send_data(&mut self, n: NodeId, v: Option<VolumeNr>, packet: Packet) {
        self.send_data_vol(n, v.map(|v| v.0), packet);
    }

    pub(crate) fn send_data_vol(&mut self, peer: NodeId, volume: Option<u16>, packet: Packet) {
        self.send(peer, Stream::Data, volume, packet, Bytes::new(), Bytes::new());
    }

    pub(crate) fn send_control(&mut self, n: NodeId, v: Option<VolumeNr>, packet: Packet) {
        self.send_control_vol(n, v.map(|v| v.0), packet);
    }

    pub(crate) fn send_control_vol(&mut self, peer: NodeId, volume: Option<u16>, packet: Packet) {
        self.send(peer, Stream::Control, volume, packet, Bytes::new(), Bytes::new());
    }

    pub(crate) fn send(
        &mut self,
        peer: NodeId,
        stream: Stream,
        volume: Option<u16>,
        packet: Packet,
        digest: Bytes,
        data: Bytes,
    ) {
        if self.conns.get(&peer).is_some_and(|c| c.link) {
            self.emit(Output::Send { peer, stream, volume, packet, digest, data });
        }
    }

    fn set_codec(&mut self, peer: NodeId, receive: bool, ctx: CodecCtx) {
        self.emit(Output::SetCodec { peer, receive, ctx });
    }

    pub(crate) fn link_up(&mut self, n: NodeId, resolve_conflicts: bool) {
        let me = self.me;
        let now = self.now;
        let Some(c) = self.conns.get_mut(&n) else { return };
        if !c.dialing {
            self.emit(Output::CloseLink(n));
            return;
        }
        c.dialing = false;
        c.link = true;
        c.resolve_conflicts = resolve_conflicts;
        c.phase = Phase::Features;
        c.codec = CodecCtx::initial();
        c.features_deadline = Some(now + c.net.ping_timeout * 4);
        c.ping_due = now + c.net.ping_int;
        c.connect_started = now;
        c.rx_dagtag = 0;
        let ctx = c.codec;
        self.set_codec(n, true, ctx);
        self.set_codec(n, false, ctx);
        self.send_data_vol(
            n,
            None,
            Packet::ConnectionFeatures(ConnectionFeatures {
                protocol_min: APV_MIN,
                features: FEATURES,
                protocol_max: APV_MAX,
                sender_node_id: me.get().into(),
                receiver_node_id: n.get().into(),
            }),
        );
    }

    /// Ends the link and tries again.
    pub(crate) fn drop_link(&mut self, n: NodeId, cstate: ConnState, why: &str) {
        let scope = self.scope(Some(n), None);
        self.log(LogLevel::Warn, scope, why);
        if self.conns.get(&n).is_some_and(|c| c.link) {
            self.emit(Output::CloseLink(n));
        }
        self.link_gone(n, cstate);
    }

    pub(crate) fn link_down(&mut self, n: NodeId, why: LinkError) {
        let Some(c) = self.conns.get(&n) else { return };
        if !c.link {
            return;
        }
        let cstate = match why {
            LinkError::BrokenPipe | LinkError::Closed => ConnState::BrokenPipe,
            LinkError::Protocol => ConnState::ProtocolError,
            LinkError::SendTimeout => ConnState::Timeout,
        };
        self.link_gone(n, cstate);
    }

    /// The link does not exist any more, for whatever reason.
    fn link_gone(&mut self, n: NodeId, cstate: ConnState) {
        let was = self.st.cstate(n);
        let Some(c) = self.conns.get_mut(&n) else { return };
        c.reset_link();
        // Writes may have waited for the end of this handshake.
        for v in self.vnrs() {
            self.todo(Todo::Kick(v));
        }
        self.connect_aborted(n);
        match was {
            ConnState::StandAlone => return,
            ConnState::Disconnecting => {
                self.standalone(n);
                return;
            }
            ConnState::Connected => {
                self.force("link", |s| {
                    if let Some(c) = s.conns.get_mut(&n) {
                        c.cstate = cstate;
                    }
                });
            }
            _ => self.transaction_lost_peer(n),
        }
        self.operations.retain(|o| o.change != Change::Connect(n));
        self.reconnect(n);
    }

    /// Unconnected, then Connecting again.
    pub(crate) fn reconnect(&mut self, n: NodeId) {
        if matches!(self.st.cstate(n), ConnState::StandAlone | ConnState::Disconnecting) {
            return;
        }
        for cstate in [ConnState::Unconnected, ConnState::Connecting] {
            self.force("connecting", |s| {
                if let Some(c) = s.conns.get_mut(&n) {
                    c.cstate = cstate;
                }
            });
        }
        let Some(c) = self.conns.get_mut(&n) else { return };
        if !c.dialing {
            c.dialing = true;
            self.emit(Output::Connect(n));
        }
    }

    /// The peer ended the connection gracefully: TearDown, and it is awaited again.
    pub(crate) fn torn_down(&mut self, n: NodeId) {
        // The peer closes the sockets; waiting for that would only delay the next attempt.
        if self.conns.get(&n).is_some_and(|c| c.link) {
            self.emit(Output::CloseLink(n));
        }
        if let Some(c) = self.conns.get_mut(&n) {
            c.reset_link();
        }
        self.reconnect(n);
    }

    /// The own side ended it: close, then StandAlone.
    pub(crate) fn disconnecting(&mut self, n: NodeId) {
        let link = self.conns.get(&n).is_some_and(|c| c.link || c.dialing);
        if link {
            self.emit(Output::CloseLink(n));
        }
        if let Some(c) = self.conns.get_mut(&n) {
            c.dialing = false;
            c.reset_link();
        }
        self.standalone(n);
    }

    fn standalone(&mut self, n: NodeId) {
        self.operations.retain(|o| o.change != Change::Connect(n));
        self.connect_aborted(n);
        for cstate in [ConnState::Disconnecting, ConnState::StandAlone] {
            if self.st.cstate(n) == ConnState::StandAlone {
                break;
            }
            self.force("disconnected", |s| {
                if let Some(c) = s.conns.get_mut(&n) {
                    c.cstate = cstate;
                }
            });
        }
        if let Some(c) = self.conns.get_mut(&n) {
            c.dialing = false;
            c.discard_my_data = false;
        }
        self.transaction_lost_peer(n);
        self.down_step();
    }

    /// Without asking anybody.
    pub(crate) fn disconnect_now(&mut self, n: NodeId) {
        self.force("disconnect", |s| {
            if let Some(c) = s.conns.get_mut(&n)
                && c.cstate != ConnState::StandAlone
            {
                c.cstate = ConnState::Disconnecting;
            }
        });
        self.disconnecting(n);
    }

    /// A condition that trying again will not change.
    fn give_up(&mut self, n: NodeId, why: &str) {
        let scope = self.scope(Some(n), None);
        self.log(LogLevel::Error, scope, why);
        self.disconnect_now(n);
    }

    pub(crate) fn packet(
        &mut self,
        n: NodeId,
        stream: Stream,
        volume: Option<u16>,
        packet: Packet,
        digest: &Bytes,
        data: Bytes,
    ) {
        let now = self.now;
        let Some(c) = self.conns.get_mut(&n) else { return };
        if !c.link {
            return;
        }
        if stream == Stream::Control && c.ping_sent.is_none() {
            c.ping_due = now + c.net.ping_int;
        }
        match packet {
            Packet::Ping => self.send_control(n, None, Packet::PingAck),
            Packet::PingAck => {
                c.ping_sent = None;
                c.ping_due = now + c.net.ping_int;
                self.ping_answered(n);
            }
            Packet::ConnectionFeatures(f) => self.got_features(n, &f),
            Packet::AuthChallenge => self.got_challenge(n, &data),
            Packet::AuthResponse => self.got_response(n, digest),
            Packet::Protocol(p) => self.got_protocol(n, &p),
            _ if c.phase < Phase::Protocol => {
                self.drop_link(
                    n,
                    ConnState::ProtocolError,
                    "unexpected packet before the handshake was finished",
                );
            }
            Packet::ProtocolUpdate(p) => self.got_protocol_update(n, &p),
            Packet::TwopcPrepare(r) => self.twopc_prepare(n, volume, r),
            Packet::TwopcPrepRsz(r) => {
                self.decline(n, volume, &r, "resizing is not supported by this engine");
            }
            Packet::TwopcCommit(r) => self.twopc_verdict(n, r, true),
            Packet::TwopcAbort(r) => self.twopc_verdict(n, r, false),
            Packet::TwopcYes(r) => self.twopc_reply(n, r, Answer::Yes),
            Packet::TwopcNo(r) => self.twopc_reply(n, r, Answer::No),
            Packet::TwopcRetry(r) => self.twopc_reply(n, r, Answer::Retry),
            Packet::Disconnect => self.give_up(n, "the peer declined the connection"),
            Packet::State(w) if volume.is_none() => {
                if w.role() == Some(Role::Secondary) && self.st.connected(n) {
                    self.force("peer-state", |s| {
                        if let Some(c) = s.conns.get_mut(&n) {
                            c.peer_role = Role::Secondary;
                        }
                    });
                }
            }
            other => self.volume_packet(n, volume.map(VolumeNr), other, digest, data),
        }
    }

    fn got_features(&mut self, n: NodeId, f: &ConnectionFeatures) {
        let me = self.me;
        let Some(c) = self.conns.get_mut(&n) else { return };
        if c.phase != Phase::Features {
            self.drop_link(n, ConnState::ProtocolError, "second P_CONNECTION_FEATURES");
            return;
        }
        let peer_max = if f.protocol_max == 0 { f.protocol_min } else { f.protocol_max };
        let apv = APV_MAX.min(peer_max);
        if peer_max < APV_MIN || f.protocol_min > APV_MAX {
            let text = format!(
                "incompatible DRBD dialects: I support {APV_MIN}-{APV_MAX}, peer supports {}-{peer_max}",
                f.protocol_min
            );
            self.give_up(n, &text);
            return;
        }
        if f.sender_node_id != u32::from(n.get()) || f.receiver_node_id != u32::from(me.get()) {
            let text = format!(
                "peer presented node ids {} -> {}, expected {n} -> {me}; check the node-id statements on both nodes",
                f.sender_node_id, f.receiver_node_id
            );
            self.drop_link(n, ConnState::NetworkFailure, &text);
            return;
        }
        c.apv = apv;
        c.features = Features(FEATURES.0 & f.features.0);
        if apv == 121 && c.features.contains(Features::RESYNC_DAGTAG) {
            self.give_up(
                n,
                "peer's protocol 121 with resync dagtags is known to be broken; upgrade the peer",
            );
            return;
        }
        c.codec.apv = apv;
        c.codec.features = c.features;
        let ctx = c.codec;
        let auth = c.net.auth.is_some();
        c.phase = if auth { Phase::Challenge } else { Phase::Protocol };
        self.set_codec(n, true, ctx);
        self.set_codec(n, false, ctx);
        let scope = self.scope(Some(n), None);
        self.log(
            LogLevel::Info,
            scope,
            format!("Handshake to peer {n} successful: Agreed network protocol version {apv}"),
        );
        if auth {
            let mut challenge = [0u8; 64];
            self.rng.fill(&mut challenge);
            if let Some(c) = self.conns.get_mut(&n) {
                c.challenge = challenge;
            }
            self.send(
                n,
                Stream::Data,
                None,
                Packet::AuthChallenge,
                Bytes::new(),
                Bytes::copy_from_slice(&challenge),
            );
        } else {
            self.send_protocol(n);
        }
    }

    fn got_challenge(&mut self, n: NodeId, data: &[u8]) {
        let me = self.me;
        let Some(c) = self.conns.get_mut(&n) else { return };
        let Some((alg, secret)) = &c.net.auth else {
            self.give_up(
                n,
                "the peer demands authentication; configure cram-hmac-alg and shared-secret on both nodes",
            );
            return;
        };
        if c.phase != Phase::Challenge {
            self.drop_link(n, ConnState::ProtocolError, "unexpected P_AUTH_CHALLENGE");
            return;
        }
        let answer = auth::check_challenge(c.apv, &c.challenge, data)
            .and_then(|()| auth::HmacAlg::parse(alg))
            .and_then(|a| auth::response(a, secret, c.apv, data, me.get()));
        match answer {
            Ok(r) => {
                c.phase = Phase::Response;
                self.send(n, Stream::Data, None, Packet::AuthResponse, Bytes::from(r), Bytes::new());
            }
            Err(e) => self.auth_failed(n, &e),
        }
    }

    fn got_response(&mut self, n: NodeId, data: &[u8]) {
        let Some(c) = self.conns.get_mut(&n) else { return };
        let Some((alg, secret)) = &c.net.auth else {
            self.give_up(
                n,
                "the peer demands authentication; configure cram-hmac-alg and shared-secret on both nodes",
            );
            return;
        };
        if c.phase != Phase::Response {
            self.drop_link(n, ConnState::ProtocolError, "unexpected P_AUTH_RESPONSE");
            return;
        }
        let ok = auth::HmacAlg::parse(alg)
            .and_then(|a| auth::verify(a, secret, c.apv, &c.challenge, n.get(), data));
        match ok {
            Ok(()) => {
                c.phase = Phase::Protocol;
                let scope = self.scope(Some(n), None);
                self.log(LogLevel::Info, scope, "Peer authenticated");
                self.send_protocol(n);
            }
            Err(e) => self.auth_failed(n, &e),
        }
    }

    fn auth_failed(&mut self, n: NodeId, e: &auth::AuthError) {
        let text = format!("Authentication of peer failed: {e}");
        if e.is_permanent() {
            self.give_up(n, &text);
        } else {
            self.drop_link(n, ConnState::NetworkFailure, &text);
        }
    }

    fn protocol_packet(&self, n: NodeId) -> Option<Protocol> {
        let c = self.conns.get(&n)?;
        Some(Protocol {
            protocol: c.net.protocol,
            after_sb_0p: c.net.after_sb_0pri,
            after_sb_1p: c.net.after_sb_1pri,
            after_sb_2p: c.net.after_sb_2pri,
            conn_flags: ConnFlags::NONE
                .with(ConnFlags::DISCARD_MY_DATA, c.discard_my_data)
                .with(ConnFlags::DRY_RUN, c.tentative),
            two_primaries: c.net.two_primaries,
            integrity_alg: c.net.integrity_alg.as_deref().and_then(AlgName::new).unwrap_or_default(),
        })
    }

    fn send_protocol(&mut self, n: NodeId) {
        let Some(p) = self.protocol_packet(n) else { return };
        let mut own = self.conns.get(&n).map_or_else(CodecCtx::initial, |c| c.codec);
        own.data_digest_len = digest_len(p.integrity_alg.as_str());
        self.send_data(n, None, Packet::Protocol(p));
        self.set_codec(n, false, own);
        if self.me < n {
            // The lower node does not wait for the peer's P_PROTOCOL (`spec/wire-protocol.md` §4.4).
            self.queue_connect(n, Duration::ZERO);
        }
    }

    fn queue_connect(&mut self, n: NodeId, wait: Duration) {
        if self.operations.iter().any(|o| o.change == Change::Connect(n)) {
            return;
        }
        let stage = if wait.is_zero() { Stage::Begin } else { Stage::Later(self.now + wait) };
        self.operations.push_back(Operation {
            change: Change::Connect(n),
            admin: None,
            stage,
            force: false,
            tries: 0,
            attempts: 0,
            started: self.now,
        });
    }

    fn got_protocol(&mut self, n: NodeId, p: &Protocol) {
        let Some(mine) = self.protocol_packet(n) else { return };
        let Some(c) = self.conns.get_mut(&n) else { return };
        if c.phase != Phase::Protocol {
            let why = if c.net.auth.is_some() {
                "the peer does not authenticate itself; configure cram-hmac-alg and shared-secret on both nodes"
            } else {
                "unexpected P_PROTOCOL"
            };
            if c.net.auth.is_some() {
                self.give_up(n, why);
            } else {
                self.drop_link(n, ConnState::ProtocolError, why);
            }
            return;
        }
        let discard = p.conn_flags.contains(ConnFlags::DISCARD_MY_DATA);
        let mismatch = [
            (mine.protocol != p.protocol, "protocol"),
            (mine.after_sb_0p != p.after_sb_0p.mirrored(), "after-sb-0pri"),
            (mine.after_sb_1p != p.after_sb_1p.mirrored(), "after-sb-1pri"),
            (mine.after_sb_2p != p.after_sb_2p.mirrored(), "after-sb-2pri"),
            (discard && c.discard_my_data, "discard-my-data"),
            (mine.two_primaries != p.two_primaries, "allow-two-primaries"),
            (mine.integrity_alg != p.integrity_alg, "data-integrity-alg"),
        ];
        if let Some((_, what)) = mismatch.iter().find(|x| x.0) {
            let text = format!("incompatible {what} settings; make them equal on both nodes");
            self.give_up(n, &text);
            return;
        }
        c.peer_discard_my_data = discard;
        c.peer_integrity = Some(p.integrity_alg.as_str().to_string()).filter(|s| !s.is_empty());
        c.tentative |= p.conn_flags.contains(ConnFlags::DRY_RUN);
        c.phase = Phase::Ready;
        c.features_deadline = None;
        let mut ctx = c.codec;
        ctx.data_digest_len = digest_len(p.integrity_alg.as_str());
        self.set_codec(n, true, ctx);
        if self.me < n {
            self.queue_connect(n, Duration::ZERO);
        }
    }

    /// Adopted without comparison (`spec/wire-protocol.md` §4.5).
    fn got_protocol_update(&mut self, n: NodeId, p: &Protocol) {
        let Some(c) = self.conns.get_mut(&n) else { return };
        c.net.protocol = p.protocol;
        c.net.after_sb_0pri = p.after_sb_0p.mirrored();
        c.net.after_sb_1pri = p.after_sb_1p.mirrored();
        c.net.after_sb_2pri = p.after_sb_2p.mirrored();
        c.net.two_primaries = p.two_primaries;
        c.peer_integrity = Some(p.integrity_alg.as_str().to_string()).filter(|s| !s.is_empty());
        let mut ctx = c.codec;
        ctx.data_digest_len = digest_len(p.integrity_alg.as_str());
        self.set_codec(n, true, ctx);
    }

    /// Options of a running connection changed.
    pub(crate) fn send_protocol_update(&mut self, n: NodeId) {
        let Some(p) = self.protocol_packet(n) else { return };
        let Some(c) = self.conns.get(&n) else { return };
        let mut ctx = c.codec;
        ctx.data_digest_len = digest_len(p.integrity_alg.as_str());
        self.send_data(n, None, Packet::ProtocolUpdate(p));
        self.set_codec(n, false, ctx);
    }

    /// A connect transaction did not succeed (`spec/state-machine.md` §7.3).
    pub(crate) fn connect_refused(&mut self, n: NodeId, op: Operation, r: Refusal) {
        let rr = self.conns.get(&n).map(|c| c.net.rr_conflict);
        self.connect_aborted(n);
        if !self.conns.get(&n).is_some_and(|c| c.link) {
            return;
        }
        let retry = |core: &mut Core, wait: Duration| {
            let mut op = op;
            op.stage = Stage::Later(core.now + wait);
            core.operations.push_back(op);
        };
        match r {
            Refusal::ConcurrentChange
            | Refusal::Timeout
            | Refusal::InTransientState
            | Refusal::PrimaryReader => {
                let jitter = self.rng.up_to(50_000_000);
                retry(self, Duration::from_millis(50) + Duration::from_nanos(jitter));
            }
            Refusal::HandshakeRetry => retry(self, Duration::from_secs(1)),
            Refusal::TwoPrimaries | Refusal::RefusedByPeer if rr == Some(RrConflict::RetryConnect) => {
                retry(self, Duration::from_secs(1));
            }
            Refusal::HandshakeDisconnect | Refusal::TwoPrimaries | Refusal::RefusedByPeer => {
                self.send_data(n, None, Packet::Disconnect);
                let text = format!("connection refused: {r}");
                self.give_up(n, &text);
            }
            _ => self.drop_link(n, ConnState::NetworkFailure, &format!("connect failed: {r}")),
        }
    }

    /// Everything received for this attempt is void.
    pub(crate) fn connect_aborted(&mut self, n: NodeId) {
        if self.st.connected(n) {
            return;
        }
        if let Some(c) = self.conns.get_mut(&n) {
            c.params_sent = false;
        }
        for v in self.vnrs() {
            // Writes may have waited for the end of this.
            self.todo(Todo::Kick(v));
            if let Some(p) = self.pds.get_mut(&(n, v)) {
                p.negotiated = None;
                p.veto = None;
                p.sent = None;
                p.sizes_received = false;
            }
        }
    }

    pub(crate) fn connect_veto(&self, n: NodeId) -> Option<Veto> {
        let vetoes: Vec<Veto> =
            self.pds.iter().filter(|((m, _), _)| *m == n).filter_map(|(_, p)| p.veto).collect();
        vetoes.iter().find(|v| **v == Veto::Disconnect).or(vetoes.first()).copied()
    }

    pub(crate) fn ping(&mut self, n: NodeId) {
        let now = self.now;
        if let Some(c) = self.conns.get_mut(&n)
            && c.link
        {
            if c.ping_sent.is_none() {
                c.ping_sent = Some(now);
            }
            self.send_control(n, None, Packet::Ping);
        }
    }

    fn ping_answered(&mut self, n: NodeId) {
        // It lives: nobody's position in its stream is final.
        for c in self.conns.values_mut().filter(|c| c.peer_dagtag.is_some_and(|d| d.0 == n)) {
            c.peer_dagtag = None;
        }
        for v in self.vnrs() {
            self.resync_ping_answered(n, v);
        }
    }

    pub(crate) fn timers(&mut self) {
        self.transaction_timer();
        for n in self.peers() {
            self.connection_timer(n);
        }
        self.peer_ack_timer();
        self.resync_timers();
        self.reconcile_timer();
        self.watch_timer();
    }

    fn connection_timer(&mut self, n: NodeId) {
        let now = self.now;
        let Some(c) = self.conns.get(&n) else { return };
        if !c.link {
            return;
        }
        if c.features_deadline.is_some_and(|t| now >= t) {
            self.drop_link(n, ConnState::NetworkFailure, "the peer did not finish the handshake in time");
            return;
        }
        if let Some(sent) = c.ping_sent {
            if now >= sent + c.net.ping_timeout {
                self.drop_link(n, ConnState::NetworkFailure, "PingAck did not arrive in time.");
                return;
            }
        } else if now >= c.ping_due {
            self.ping(n);
        }
        let Some(c) = self.conns.get(&n) else { return };
        if c.net.ko_count > 0
            && let Some(oldest) = self.oldest_unacked(n)
        {
            let limit = c.net.timeout * c.net.ko_count;
            if now >= oldest + limit && now >= c.connect_started + limit {
                self.drop_link(
                    n,
                    ConnState::Timeout,
                    "Remote failed to finish a request within ko-count * timeout",
                );
            }
        }
    }

    pub(crate) fn next_deadline(&self) -> Option<Time> {
        let conns = self.conns.values().filter(|c| c.link).filter_map(|c| {
            let ping = c.ping_sent.map_or(c.ping_due, |t| t + c.net.ping_timeout);
            let ko = (c.net.ko_count > 0).then(|| self.oldest_unacked(c.peer)).flatten().map(|t| {
                let limit = c.net.timeout * c.net.ko_count;
                (t + limit).max(c.connect_started + limit)
            });
            [Some(ping), c.features_deadline, ko].into_iter().flatten().min()
        });
        let others = [
            self.operations_deadline(),
            self.peer_ack_deadline(),
            self.epoch_deadline(),
            self.resync_deadline(),
            self.reconcile_until,
            self.watch_deadline(),
        ];
        conns.chain(others.into_iter().flatten()).min()
    }
}

/// Bytes of a digest by its name; 0 for none or one unknown here (refused when configured).
pub(crate) fn digest_len(alg: &str) -> usize {
    if alg.is_empty() { 0 } else { auth::DigestAlg::parse(alg).map_or(0, auth::DigestAlg::output_len) }
}
