//! The kernel's NBD client, commanded over generic netlink (`linux/nbd-netlink.h`).

use crate::sys;
use bytes::BufMut;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::RawFd;

const NLMSG_ERROR: u16 = 2;
const GENL_ID_CTRL: u16 = 16;
const FLAGS_REQUEST_ACK: u16 = 1 | 4;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const NESTED: u16 = 1 << 15;

const CMD_CONNECT: u8 = 1;
const CMD_DISCONNECT: u8 = 2;
const CMD_RECONFIGURE: u8 = 3;

const ATTR_INDEX: u16 = 1;
const ATTR_SIZE_BYTES: u16 = 2;
const ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const ATTR_SERVER_FLAGS: u16 = 5;
const ATTR_SOCKETS: u16 = 7;
const ATTR_BACKEND_IDENTIFIER: u16 = 10;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;

/// Bytes of the netlink and generic netlink headers.
const HEADERS_LEN: usize = 16 + 4;

/// An open line to the kernel's NBD client.
pub(super) struct NbdControl {
    socket: File,
    family: u16,
}

impl NbdControl {
    /// # Errors
    /// `NotFound` when the kernel has no NBD client (here: the module is not loaded, or this is a
    /// network namespace that it does not serve).
    pub fn open() -> io::Result<Self> {
        let mut socket = sys::netlink_socket()?;
        let mut attributes = Vec::new();
        put(&mut attributes, CTRL_ATTR_FAMILY_NAME, b"nbd\0");
        let reply = exchange(&mut socket, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, &attributes)?;
        let family = find(&reply, CTRL_ATTR_FAMILY_ID)
            .and_then(|value| value.first_chunk().copied())
            .map(u16::from_ne_bytes)
            .ok_or(io::ErrorKind::NotFound)?;
        Ok(Self { socket, family })
    }

    /// Binds a free NBD device to a socket; gives its number.
    pub fn connect(&mut self, device: &Connect<'_>) -> io::Result<u32> {
        let mut attributes = Vec::new();
        put(&mut attributes, ATTR_SIZE_BYTES, &device.size.to_ne_bytes());
        put(&mut attributes, ATTR_BLOCK_SIZE_BYTES, &u64::from(device.block).to_ne_bytes());
        put(&mut attributes, ATTR_SERVER_FLAGS, &u64::from(device.flags).to_ne_bytes());
        put(&mut attributes, ATTR_BACKEND_IDENTIFIER, &[device.identifier.as_bytes(), &[0]].concat());
        let (mut fd, mut item) = (Vec::new(), Vec::new());
        put(&mut fd, SOCK_FD, &(device.socket as u32).to_ne_bytes());
        put(&mut item, SOCK_ITEM | NESTED, &fd);
        put(&mut attributes, ATTR_SOCKETS | NESTED, &item);
        let reply = exchange(&mut self.socket, self.family, CMD_CONNECT, &attributes)?;
        find(&reply, ATTR_INDEX)
            .and_then(|value| value.first_chunk().copied())
            .map(u32::from_ne_bytes)
            .ok_or_else(|| io::Error::other("the kernel did not tell the number of the device"))
    }

    pub fn disconnect(&mut self, number: u32) -> io::Result<()> {
        let mut attributes = Vec::new();
        put(&mut attributes, ATTR_INDEX, &number.to_ne_bytes());
        exchange(&mut self.socket, self.family, CMD_DISCONNECT, &attributes).map(drop)
    }

    /// Gives a device another size; the kernel wants to hear the identifier it was connected with.
    pub fn resize(&mut self, number: u32, identifier: &str, size: u64) -> io::Result<()> {
        let mut attributes = Vec::new();
        put(&mut attributes, ATTR_INDEX, &number.to_ne_bytes());
        put(&mut attributes, ATTR_SIZE_BYTES, &size.to_ne_bytes());
        put(&mut attributes, ATTR_BACKEND_IDENTIFIER, &[identifier.as_bytes(), &[0]].concat());
        exchange(&mut self.socket, self.family, CMD_RECONFIGURE, &attributes).map(drop)
    }
}

/// What the kernel has to know of a device.
pub(super) struct Connect<'a> {
    pub socket: RawFd,
    pub size: u64,
    pub block: u32,
    /// Transmission flags of the NBD protocol.
    pub flags: u16,
    /// Shown in `/sys/block/nbdN/backend` (Linux 5.14).
    pub identifier: &'a str,
}

fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    out.put_u16_ne(4 + value.len() as u16);
    out.put_u16_ne(kind);
    out.put_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// The value of the first attribute of that kind.
fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let len = usize::from(u16::from_ne_bytes(*attributes.first_chunk()?));
        let kind = u16::from_ne_bytes(*attributes.get(2..)?.first_chunk()?);
        let value = attributes.get(4..len)?;
        if kind & !NESTED == wanted {
            return Some(value);
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
}

/// Sends one command and waits for its acknowledgement; gives the attributes that came before it.
fn exchange(socket: &mut File, family: u16, command: u8, attributes: &[u8]) -> io::Result<Vec<u8>> {
    let mut message = Vec::with_capacity(HEADERS_LEN + attributes.len());
    message.put_u32_ne((HEADERS_LEN + attributes.len()) as u32);
    message.put_u16_ne(family);
    message.put_u16_ne(FLAGS_REQUEST_ACK);
    message.put_u64_ne(0);
    message.put_slice(&[command, 1, 0, 0]);
    message.put_slice(attributes);
    socket.write_all(&message)?;
    let mut found = Vec::new();
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let len = socket.read(&mut buffer)?;
        let mut rest = buffer.get(..len).unwrap_or_default();
        while let Some((kind, body, next)) = split(rest) {
            rest = next;
            if kind == NLMSG_ERROR {
                let error = body.first_chunk().copied().map_or(-libc::EPROTO, i32::from_ne_bytes);
                return if error == 0 { Ok(found) } else { Err(io::Error::from_raw_os_error(-error)) };
            }
            if kind == family {
                found = body.get(4..).unwrap_or_default().to_vec();
            }
        }
    }
}

/// The type and body of the first message, and what follows it.
fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(16..len)?;
    Some((kind, body, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_found() {
        let mut out = Vec::new();
        put(&mut out, 3, b"abcde");
        put(&mut out, 7 | NESTED, &[1, 2]);
        assert_eq!(out.len(), 12 + 8);
        assert_eq!(find(&out, 3), Some(b"abcde".as_slice()));
        assert_eq!(find(&out, 7), Some([1, 2].as_slice()));
        assert_eq!(find(&out, 4), None);
        assert_eq!(find(&out[..15], 7), None);
        assert_eq!(find(&[0, 0, 0, 0], 1), None, "a length of nothing is not followed for ever");
    }

    #[test]
    fn the_kernel_answers() {
        // Every kernel has the controller itself; what it says of an unknown family is "not found".
        let mut socket = sys::netlink_socket().unwrap();
        let mut name = Vec::new();
        put(&mut name, CTRL_ATTR_FAMILY_NAME, b"no-such\0");
        let error = exchange(&mut socket, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, &name).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let mut name = Vec::new();
        put(&mut name, CTRL_ATTR_FAMILY_NAME, b"nlctrl\0");
        let reply = exchange(&mut socket, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, &name).unwrap();
        assert_eq!(find(&reply, CTRL_ATTR_FAMILY_ID), Some(GENL_ID_CTRL.to_ne_bytes().as_slice()));
    }
}
