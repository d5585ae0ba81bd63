//! The packets of §12, as bytes. `00*n` stands for n zero bytes.

use palisade_wire::Stream::{self, Control, Data};

/// (section, stream, APV, feature flags, header and payload without bulk data, bytes of bulk data)
pub type Example = (&'static str, Stream, u32, u32, &'static str, usize);

#[rustfmt::skip]
pub const EXAMPLES: &[Example] = &[
    ("12.1 data socket", Data, 86, 0, "83740267 fff2 0000", 0),
    ("12.1 control socket", Control, 86, 0, "83740267 fff1 0000", 0),
    ("12.1 features", Data, 86, 0, "83740267 fffe 0048 00000056 0000000f 00000065 00*12 00*48", 0),
    ("12.1 protocol", Data, 101, 15, "8620ec20 0000 000b 00000019 00*4 00000003 00*21", 0),
    ("12.1 sync param", Data, 101, 15,
     "8620ec20 0000 0023 00000094 00*4 000000fa 00*64 00*64 00000014 0000000a 00000064 00019000", 0),
    ("12.1 sizes", Data, 101, 15,
     "8620ec20 0000 000d 00000038 00*4 0000000000200000 00*8 0000000000200000 00100000 0000 0000
      00000200 00000200 00*4 00000200 00*4 00*4", 0),
    ("12.1 uuids", Data, 101, 15, "8620ec20 0000 000c 00000030 00*4 1111222233334444 00*40", 0),
    ("12.1 state", Data, 101, 15, "8620ec20 0000 000e 00000004 00*4 0000d082", 0),
    ("12.2 features", Data, 86, 0,
     "83740267 fffe 0048 00000056 000003ff 0000007c 00000000 00000001 00*4 00*48", 0),
    ("12.2 protocol", Data, 124, 1023, "8620ec20 ffff 000b 00000019 00*4 00000003 00*21", 0),
    ("12.2 prepare", Data, 124, 1023,
     "8620ec20 ffff 002e 00000024 00*4 5a17c3d1 c0000000 0000 00 01 fffffffffffffffc 00*8 000001f3 00000092", 0),
    ("12.2 ping", Control, 124, 1023, "8620ec20 ffff 0013 00000000 00*4", 0),
    ("12.2 enable replication", Data, 124, 1023, "8620ec20 0000 0058 00000004 00*4 01000000", 0),
    ("12.2 sizes", Data, 124, 1023,
     "8620ec20 0000 000d 00000038 00*4 0000000000200000 00*8 0000000000200000 00100000 00*4
      00000200 00000200 00*4 00000200 00*4 01 0000 00", 0),
    ("12.2 uuids", Data, 124, 1023,
     "8620ec20 0000 0042 00000130 00*4 1111222233334444 00*8 0000000000000020 00*8 0000000000000002 00*8 00*256", 0),
    ("12.2 state", Data, 124, 1023, "8620ec20 0000 000e 00000004 00*4 0080f282", 0),
    ("12.2 yes", Control, 124, 1023,
     "8620ec20 ffff 0045 00000020 00*4 5a17c3d1 00000000 0000000000000003 00*8 00*8", 0),
    ("12.2 commit", Data, 124, 1023,
     "8620ec20 ffff 0047 00000024 00*4 5a17c3d1 c0000000 0000 00 01 fffffffffffffffc 00*8 0000000000000003", 0),
    ("12.3 dagtag", Data, 124, 1023, "8620ec20 ffff 0030 00000008 00*4 0000000000001000", 0),
    ("12.3 write", Data, 124, 1023,
     "8620ec20 0000 0000 00001018 00*4 0000000000000800 40e2018c80a0ffff 00000001 00000102", 4096),
    ("12.3 write ack", Control, 124, 1023,
     "8620ec20 0000 0016 00000018 00*4 0000000000000800 40e2018c80a0ffff 00001000 00000001", 0),
    ("12.3 barrier", Data, 124, 1023, "8620ec20 ffff 0003 00000008 00*4 07000000 00*4", 0),
    ("12.3 barrier ack", Control, 124, 1023, "8620ec20 ffff 001c 00000008 00*4 07000000 00000001", 0),
    ("12.3 peer ack", Control, 124, 1023, "8620ec20 ffff 0040 00000010 00*4 0000000000000003 0000000000001008", 0),
    ("12.4 request", Data, 124, 1023,
     "8620ec20 0000 004c 00000020 00*4 0000000000001000 80c4327a80a0ffff 00008000 00000000 0000000000001008", 0),
    ("12.4 reply", Data, 124, 1023,
     "8620ec20 0000 0002 00008018 00*4 0000000000001000 80c4327a80a0ffff 00*8", 32768),
    ("12.4 ack", Control, 124, 1023,
     "8620ec20 0000 0017 00000018 00*4 0000000000001000 80c4327a80a0ffff 00008000 00000002", 0),
    ("12.4 request 8.4", Data, 101, 15,
     "8620ec20 0000 0009 00000018 00*4 0000000000001000 ffffffffffffffff 00008000 00000000", 0),
    ("12.4 reply 8.4", Data, 101, 15,
     "8620ec20 0000 0002 00008018 00*4 0000000000001000 ffffffffffffffff 00*8", 32768),
    ("12.4 ack 8.4", Control, 101, 15,
     "8620ec20 0000 0017 00000018 00*4 0000000000001000 ffffffffffffffff 00008000 00000001", 0),
    ("12.5 bitmap", Data, 124, 1023, "8620ec20 0000 0024 00000009 00*4 72", 8),
];

/// The bytes of an example.
pub fn bytes(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in text.split_whitespace() {
        match word.strip_prefix("00*") {
            Some(count) => bytes.resize(bytes.len() + count.parse::<usize>().unwrap(), 0),
            None => {
                let pairs = word.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap());
                bytes.extend(pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()));
            }
        }
    }
    bytes
}
