//! Fixed newstyle negotiation: the client's flags and options until it has chosen an export.

use super::proto::{self, Reader};
use super::session::{Close, Export, Phase, Session};
use super::{CONTEXT_ALLOCATION, CONTEXT_OUT_OF_SYNC};
use bytes::BufMut;

/// Bytes of an option header: magic, option, length.
const HEADER_LEN: usize = 16;

/// Longest option data we keep: room for a 4096-byte name and many context queries, and well
/// below the staging buffer.
const DATA_MAX: usize = 16 * 1024;

/// Longest export name (protocol: "string").
const NAME_MAX: usize = 4096;

/// Identifiers of the metadata contexts on the wire.
pub(super) const ID_ALLOCATION: u32 = 1;
pub(super) const ID_OUT_OF_SYNC: u32 = 2;

const KNOWN: [(u32, &str); 2] = [(ID_ALLOCATION, CONTEXT_ALLOCATION), (ID_OUT_OF_SYNC, CONTEXT_OUT_OF_SYNC)];

/// Metadata contexts chosen by SET_META_CONTEXT, valid for one export only.
#[derive(Debug, Default)]
pub(super) struct Contexts {
    export: Option<usize>,
    pub allocation: bool,
    pub out_of_sync: bool,
}

impl Session {
    pub(super) fn step_hello(&mut self) -> bool {
        let Some(flags) = self.peek(4).and_then(|head| Reader(head).u32()) else { return false };
        self.skip(4);
        let known = u32::from(proto::FLAG_FIXED_NEWSTYLE | proto::FLAG_NO_ZEROES);
        if flags & !known != 0 {
            self.close(Close::Protocol("unknown client flags"));
            return false;
        }
        self.no_zeroes = flags & u32::from(proto::FLAG_NO_ZEROES) != 0;
        self.phase = Phase::Option;
        true
    }

    pub(super) fn step_option(&mut self) -> bool {
        let Some(head) = self.peek(HEADER_LEN) else { return false };
        let mut head = Reader(head);
        let (Some(magic), Some(option), Some(len)) = (head.u64(), head.u32(), head.u32()) else {
            return false;
        };
        let len = len as usize;
        if magic != proto::OPT_MAGIC {
            self.close(Close::Protocol("wrong option magic"));
            return false;
        }
        if len > DATA_MAX {
            self.skip(HEADER_LEN);
            if option == proto::OPT_EXPORT_NAME {
                self.close(Close::Protocol("export name too long"));
                return false;
            }
            self.phase = Phase::OptionSkip { option, left: len };
            return self.count_option();
        }
        let Some(all) = self.peek(HEADER_LEN + len) else { return false };
        let data = all.get(HEADER_LEN..).unwrap_or_default().to_vec();
        self.skip(HEADER_LEN + len);
        if !self.count_option() {
            return false;
        }
        self.option(option, &data);
        self.closed().is_none()
    }

    fn count_option(&mut self) -> bool {
        self.options_seen += 1;
        if self.options_seen > self.limits.options_max {
            self.close(Close::Protocol("too many options"));
        }
        self.closed().is_none()
    }

    pub(super) fn refuse_long_option(&mut self, option: u32) {
        self.put_option_error(option, proto::REP_ERR_TOO_BIG, "The option is too long.");
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        match option {
            proto::OPT_EXPORT_NAME => self.option_export_name(data),
            proto::OPT_ABORT => {
                self.put_option_reply(option, proto::REP_ACK, &[]);
                self.close(Close::Requested);
            }
            proto::OPT_LIST if data.is_empty() => self.option_list(),
            proto::OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                self.put_option_reply(option, proto::REP_ACK, &[]);
            }
            proto::OPT_LIST | proto::OPT_STRUCTURED_REPLY => {
                self.put_option_error(option, proto::REP_ERR_INVALID, "The option takes no data.");
            }
            proto::OPT_INFO | proto::OPT_GO => self.option_go(option, data),
            proto::OPT_LIST_META_CONTEXT | proto::OPT_SET_META_CONTEXT => {
                self.option_context(option, data);
            }
            _ => self.put_option_error(option, proto::REP_ERR_UNSUP, "The option is not known."),
        }
    }

    fn option_export_name(&mut self, name: &[u8]) {
        // This option has no way to say no (protocol).
        let Some(index) = self.find(name) else {
            self.close(Close::Protocol("unknown export name"));
            return;
        };
        self.enter(index);
        let flags = self.export_info(index).map_or(0, transmission_flags);
        let (size, zeroes) = (self.size, if self.no_zeroes { 0 } else { 124 });
        self.output.header(|out| {
            out.put_u64(size);
            out.put_u16(flags);
            out.put_bytes(0, zeroes);
        });
    }

    fn option_list(&mut self) {
        let exports = self.exports.clone();
        for export in exports.iter() {
            let mut data = Vec::new();
            data.put_u32(export.name.len() as u32);
            data.put_slice(export.name.as_bytes());
            data.put_slice(export.description.as_bytes());
            self.put_option_reply(proto::OPT_LIST, proto::REP_SERVER, &data);
        }
        self.put_option_reply(proto::OPT_LIST, proto::REP_ACK, &[]);
    }

    fn option_go(&mut self, option: u32, data: &[u8]) {
        let Some((name, wanted)) = parse_go(data) else {
            self.put_option_error(option, proto::REP_ERR_INVALID, "The option's data is malformed.");
            return;
        };
        let Some(index) = self.find(name) else {
            self.put_option_error(option, proto::REP_ERR_UNKNOWN, "There is no such export here.");
            return;
        };
        let Some(export) = self.exports.get(index).cloned() else { return };
        // Clients that did not ask may use any block size down to 512 (protocol, "Block size
        // constraints"); a larger minimum must have been seen.
        if option == proto::OPT_GO && export.block_min > 512 && !wanted.contains(&proto::INFO_BLOCK_SIZE) {
            let text = "Ask for the block sizes first.";
            self.put_option_error(option, proto::REP_ERR_BLOCK_SIZE_REQD, text);
            return;
        }
        let mut info = Vec::new();
        info.put_u16(proto::INFO_EXPORT);
        info.put_u64(export.size);
        info.put_u16(transmission_flags(&export));
        self.put_option_reply(option, proto::REP_INFO, &info);
        if wanted.contains(&proto::INFO_NAME) {
            self.put_info_text(option, proto::INFO_NAME, &export.name);
        }
        if wanted.contains(&proto::INFO_DESCRIPTION) {
            self.put_info_text(option, proto::INFO_DESCRIPTION, &export.description);
        }
        info.clear();
        info.put_u16(proto::INFO_BLOCK_SIZE);
        info.put_u32(export.block_min);
        info.put_u32(export.block_preferred);
        info.put_u32(self.limits.payload_max);
        self.put_option_reply(option, proto::REP_INFO, &info);
        self.put_option_reply(option, proto::REP_ACK, &[]);
        if option == proto::OPT_GO {
            self.enter(index);
        }
    }

    fn option_context(&mut self, option: u32, data: &[u8]) {
        let set = option == proto::OPT_SET_META_CONTEXT;
        if set {
            self.contexts = Contexts::default();
        }
        let Some((name, queries)) = parse_context(data) else {
            self.put_option_error(option, proto::REP_ERR_INVALID, "The option's data is malformed.");
            return;
        };
        if !self.structured {
            let text = "Structured replies must be negotiated first.";
            self.put_option_error(option, proto::REP_ERR_INVALID, text);
            return;
        }
        let Some(index) = self.find(name) else {
            self.put_option_error(option, proto::REP_ERR_UNKNOWN, "There is no such export here.");
            return;
        };
        for (id, known) in KNOWN {
            let wanted = queries.iter().any(|query| {
                // `base:` lists a whole namespace but chooses nothing (protocol).
                let namespace = query.strip_suffix(b":").is_some_and(|space| {
                    known.split(':').next().is_some_and(|known| known.as_bytes() == space)
                });
                *query == known.as_bytes() || (!set && namespace)
            });
            if !wanted && (set || !queries.is_empty()) {
                continue;
            }
            let mut reply = Vec::new();
            reply.put_u32(if set { id } else { 0 });
            reply.put_slice(known.as_bytes());
            self.put_option_reply(option, proto::REP_META_CONTEXT, &reply);
            if set {
                self.contexts.export = Some(index);
                self.contexts.allocation |= id == ID_ALLOCATION;
                self.contexts.out_of_sync |= id == ID_OUT_OF_SYNC;
            }
        }
        self.put_option_reply(option, proto::REP_ACK, &[]);
    }

    /// Goes to the transmission phase.
    fn enter(&mut self, index: usize) {
        if self.contexts.export != Some(index) {
            self.contexts = Contexts::default();
        }
        self.choose(index);
        self.phase = Phase::Request;
    }

    /// The export of that name; the empty name is the only export, if there is one only.
    fn find(&self, name: &[u8]) -> Option<usize> {
        let exact = self.exports.iter().position(|export| export.name.as_bytes() == name);
        exact.or_else(|| (name.is_empty() && self.exports.len() == 1).then_some(0))
    }

    fn export_info(&self, index: usize) -> Option<&Export> {
        self.exports.get(index)
    }

    fn put_info_text(&mut self, option: u32, kind: u16, text: &str) {
        let mut data = Vec::with_capacity(2 + text.len());
        data.put_u16(kind);
        data.put_slice(text.as_bytes());
        self.put_option_reply(option, proto::REP_INFO, &data);
    }

    fn put_option_error(&mut self, option: u32, error: u32, text: &str) {
        self.put_option_reply(option, error, text.as_bytes());
    }

    fn put_option_reply(&mut self, option: u32, reply: u32, data: &[u8]) {
        self.output.header(|out| {
            out.put_u64(proto::OPT_REPLY_MAGIC);
            out.put_u32(option);
            out.put_u32(reply);
            out.put_u32(data.len() as u32);
            out.put_slice(data);
        });
    }
}

/// What an export can do.
pub(crate) fn transmission_flags(export: &Export) -> u16 {
    let mut flags = proto::TX_HAS_FLAGS
        | proto::TX_SEND_FLUSH
        | proto::TX_SEND_FUA
        | proto::TX_SEND_DF
        | proto::TX_CAN_MULTI_CONN;
    if export.read_only {
        flags |= proto::TX_READ_ONLY;
    } else {
        flags |= proto::TX_SEND_WRITE_ZEROES | proto::TX_SEND_FAST_ZERO;
        if export.discard {
            flags |= proto::TX_SEND_TRIM;
        }
    }
    if export.rotational {
        flags |= proto::TX_ROTATIONAL;
    }
    flags
}

/// Export name and information requests of INFO and GO.
fn parse_go(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut data = Reader(data);
    let name = data.string()?;
    let count = data.u16()?;
    let wanted: Option<Vec<u16>> = (0..count).map(|_| data.u16()).collect();
    (name.len() <= NAME_MAX && data.0.is_empty()).then_some((name, wanted?))
}

/// Export name and queries of LIST_META_CONTEXT and SET_META_CONTEXT.
fn parse_context(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut data = Reader(data);
    let name = data.string()?;
    let count = data.u32()? as usize;
    // Each query takes at least its length: a count that cannot be true allocates nothing.
    if count > data.0.len() / 4 {
        return None;
    }
    let queries: Option<Vec<&[u8]>> = (0..count).map(|_| data.string()).collect();
    (name.len() <= NAME_MAX && data.0.is_empty()).then_some((name, queries?))
}
