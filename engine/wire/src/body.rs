//! How the fixed parts of packets become structs: fields one after the other, padding at the end.

use bytes::{BufMut, BytesMut};

use crate::{Cmd, DecodeCtx, WireError};

/// The not yet decoded rest of a fixed part.
pub(crate) struct Reader<'a> {
    pub(crate) cmd: Cmd,
    total: usize,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(cmd: Cmd, rest: &'a [u8]) -> Self {
        Self { cmd, total: rest.len(), rest }
    }

    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        match self.rest.split_at_checked(count) {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(head)
            }
            None => {
                let given = self.total as u64;
                let needed = given - self.rest.len() as u64 + count as u64;
                Err(WireError::Incomplete { cmd: self.cmd, announced: needed, given })
            }
        }
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    pub(crate) fn field<T: Field>(&mut self, name: &'static str) -> Result<T, WireError> {
        T::get(self, name)
    }

    pub(crate) fn invalid(&self, field: &'static str, value: u64) -> WireError {
        WireError::Field { cmd: self.cmd, field, value }
    }
}

/// A value of fixed size inside a packet, big endian.
pub(crate) trait Field: Sized {
    const LEN: usize;
    fn get(from: &mut Reader<'_>, name: &'static str) -> Result<Self, WireError>;
    fn put(&self, out: &mut BytesMut);
}

macro_rules! integer_fields {
    ($($type:ty: $put:ident),*) => {$(
        impl Field for $type {
            const LEN: usize = size_of::<$type>();
            fn get(from: &mut Reader<'_>, _name: &'static str) -> Result<Self, WireError> {
                Ok(Self::from_be_bytes(from.array()?))
            }
            fn put(&self, out: &mut BytesMut) {
                out.$put(*self);
            }
        }
    )*};
}
integer_fields!(u8: put_u8, u16: put_u16, u32: put_u32, u64: put_u64, i32: put_i32);

macro_rules! newtype_fields {
    ($($type:ty: $repr:ty),*) => {$(
        impl Field for $type {
            const LEN: usize = size_of::<$repr>();
            fn get(from: &mut Reader<'_>, name: &'static str) -> Result<Self, WireError> {
                from.field(name).map(Self)
            }
            fn put(&self, out: &mut BytesMut) {
                self.0.put(out);
            }
        }
    )*};
}
newtype_fields!(
    crate::Features: u32,
    crate::DpFlags: u32,
    crate::UuidFlags: u64,
    crate::TwopcFlags: u32,
    crate::ConnFlags: u32,
    crate::DdsFlags: u16,
    crate::StateReply: i32,
    crate::StateWord: u32
);

macro_rules! enum_fields {
    ($($type:ty),*) => {$(
        impl Field for $type {
            const LEN: usize = 4;
            fn get(from: &mut Reader<'_>, name: &'static str) -> Result<Self, WireError> {
                let number: u32 = from.field(name)?;
                u8::try_from(number)
                    .ok()
                    .and_then(Self::from_u8)
                    .ok_or_else(|| from.invalid(name, number.into()))
            }
            fn put(&self, out: &mut BytesMut) {
                out.put_u32(u32::from(self.as_u8()));
            }
        }
    )*};
}
enum_fields!(crate::WireProtocol, crate::AfterSb);

/// One byte, zero or not.
impl Field for bool {
    const LEN: usize = 1;
    fn get(from: &mut Reader<'_>, name: &'static str) -> Result<Self, WireError> {
        from.field::<u8>(name).map(|byte| byte != 0)
    }
    fn put(&self, out: &mut BytesMut) {
        out.put_u8(u8::from(*self));
    }
}

impl Field for [u64; 2] {
    const LEN: usize = 16;
    fn get(from: &mut Reader<'_>, name: &'static str) -> Result<Self, WireError> {
        Ok([from.field(name)?, from.field(name)?])
    }
    fn put(&self, out: &mut BytesMut) {
        self[0].put(out);
        self[1].put(out);
    }
}

/// The fixed part of a packet.
pub(crate) trait Body: Sized {
    /// Smallest and largest length in bytes. If they differ, nothing follows the body.
    fn len_range(cmd: Cmd, ctx: &DecodeCtx) -> (usize, usize);
    fn get(from: &mut Reader<'_>, ctx: &DecodeCtx) -> Result<Self, WireError>;
    fn put(&self, cmd: Cmd, ctx: &DecodeCtx, out: &mut BytesMut) -> Result<(), WireError>;
}

/// Declares a packet's fixed part: fields in wire order, then `pad` bytes that are sent as zero and
/// ignored on receive (§14, point 12). `check` is run on what is received and on what is sent.
macro_rules! layout {
    (
        $(#[$meta:meta])*
        $name:ident: $len:literal bytes, pad $pad:literal, check $check:expr;
        { $($(#[$fmeta:meta])* $field:ident: $type:ty,)* }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub struct $name {
            $($(#[$fmeta])* pub $field: $type,)*
        }

        const _: () = assert!($len == $pad $(+ <$type as $crate::body::Field>::LEN)*);

        impl $crate::body::Body for $name {
            fn len_range(_: $crate::Cmd, _: &$crate::DecodeCtx) -> (usize, usize) {
                ($len, $len)
            }

            fn get(
                from: &mut $crate::body::Reader<'_>,
                ctx: &$crate::DecodeCtx,
            ) -> Result<Self, $crate::WireError> {
                let this = Self { $($field: from.field(stringify!($field))?,)* };
                from.bytes($pad)?;
                let check: $crate::body::Check<Self> = $check;
                check(&this, from.cmd, ctx)?;
                Ok(this)
            }

            fn put(
                &self,
                cmd: $crate::Cmd,
                ctx: &$crate::DecodeCtx,
                out: &mut bytes::BytesMut,
            ) -> Result<(), $crate::WireError> {
                let check: $crate::body::Check<Self> = $check;
                check(self, cmd, ctx)?;
                $($crate::body::Field::put(&self.$field, out);)*
                bytes::BufMut::put_bytes(out, 0, $pad);
                Ok(())
            }
        }
    };
}
pub(crate) use layout;

/// What a value must satisfy beyond its layout.
pub(crate) type Check<T> = fn(&T, Cmd, &DecodeCtx) -> Result<(), WireError>;

/// The check of a layout in which every bit pattern is fine.
pub(crate) fn any<T>(_: &T, _: Cmd, _: &DecodeCtx) -> Result<(), WireError> {
    Ok(())
}
