//! Writes and reads the fields of a state, one after the other: numbers little-endian, lists behind their length.
//!
//! What is read is checked: a length that the bytes do not hold is refused before anything is made room for.

use std::mem;

use thiserror::Error;

/// Bytes that are no state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("its field `{field}` cannot be")]
pub struct Malformed {
    pub field: &'static str,
}

/// A structure of KVM's that is nothing but its bytes.
///
/// # Safety
///
/// It has no bytes that belong to none of its fields, and any bytes are one.
pub unsafe trait Plain: Default {}

/// Fields on their way out.
#[derive(Debug, Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    pub fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub fn u16(&mut self, value: u16) {
        self.0.extend(value.to_le_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    /// A list's length: none that is kept comes near the bound.
    pub fn count(&mut self, count: usize) {
        self.u32(count as u32);
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.0.extend(bytes);
    }

    pub fn plain<T: Plain>(&mut self, value: &T) {
        // SAFETY: the value is borrowed meanwhile, and by its trait all of its bytes are initialised.
        let bytes =
            unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) };
        self.0.extend(bytes);
    }

    pub fn list<T: Plain>(&mut self, list: &[T]) {
        self.count(list.len());
        list.iter().for_each(|value| self.plain(value));
    }
}

/// Fields on their way in.
#[derive(Debug)]
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub fn of(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], Malformed> {
        let (first, rest) = self.0.split_first_chunk().ok_or(Malformed { field })?;
        self.0 = rest;
        Ok(*first)
    }

    fn take(&mut self, bytes: usize, field: &'static str) -> Result<&'a [u8], Malformed> {
        let (first, rest) = self.0.split_at_checked(bytes).ok_or(Malformed { field })?;
        self.0 = rest;
        Ok(first)
    }

    pub fn u8(&mut self, field: &'static str) -> Result<u8, Malformed> {
        self.array(field).map(u8::from_le_bytes)
    }

    pub fn u16(&mut self, field: &'static str) -> Result<u16, Malformed> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub fn u32(&mut self, field: &'static str) -> Result<u32, Malformed> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, field: &'static str) -> Result<u64, Malformed> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub fn flag(&mut self, field: &'static str) -> Result<bool, Malformed> {
        match self.u8(field)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed { field }),
        }
    }

    pub fn bytes(&mut self, field: &'static str) -> Result<&'a [u8], Malformed> {
        let bytes = self.u32(field)? as usize;
        self.take(bytes, field)
    }

    pub fn text(&mut self, field: &'static str) -> Result<String, Malformed> {
        String::from_utf8(self.bytes(field)?.to_vec()).map_err(|_| Malformed { field })
    }

    pub fn plain<T: Plain>(&mut self, field: &'static str) -> Result<T, Malformed> {
        let bytes = self.take(size_of::<T>(), field)?;
        let mut value = T::default();
        // SAFETY: both are so many bytes long and apart from each other, and by its trait any bytes are a value.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut value).cast::<u8>(), size_of::<T>())
        };
        Ok(value)
    }

    /// A list of at most so many.
    pub fn list<T: Plain>(&mut self, most: usize, field: &'static str) -> Result<Vec<T>, Malformed> {
        let count = self.count(most, field)?;
        if count * mem::size_of::<T>() > self.0.len() {
            return Err(Malformed { field });
        }
        (0..count).map(|_| self.plain(field)).collect()
    }

    /// A list's length.
    pub fn count(&mut self, most: usize, field: &'static str) -> Result<usize, Malformed> {
        let count = self.u32(field)? as usize;
        if count <= most { Ok(count) } else { Err(Malformed { field }) }
    }

    /// Nothing follows.
    pub fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed { field: "end" }) }
    }
}
