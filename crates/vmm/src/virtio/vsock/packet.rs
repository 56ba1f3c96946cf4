//! Encodes and decodes what stands in front of every packet (virtio 1.2, section 5.10.6).
//!
//! `virtio-vsock`'s own packet wants all data of a packet in one descriptor, which drivers do not promise (Linux does not since
//! 6.7, for what is sent without a copy). A header is 44 bytes, so it is read here.

pub const HEADER_BYTES: usize = 44;

/// The host, as guests address it.
pub const HOST_CID: u64 = 2;
pub const STREAM: u16 = 1;

/// In a shutdown: its sender takes no more, or sends no more.
pub const NO_MORE_TAKEN: u32 = 1;
pub const NO_MORE_SENT: u32 = 2;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Operation {
    pub fn from_wire(operation: u16) -> Option<Self> {
        use Operation::*;
        let all = [Request, Response, Reset, Shutdown, Data, CreditUpdate, CreditRequest];
        all.into_iter().find(|known| *known as u16 == operation)
    }
}

/// A header's fields, as they are named by the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    pub kind: u16,
    pub operation: u16,
    pub flags: u32,
    /// How much its sender buffers for this connection.
    pub buf_alloc: u32,
    /// How much of what it was sent it has passed on, of all time.
    pub fwd_cnt: u32,
}

impl Header {
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        fn field<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
            let mut field = [0; N];
            if let Some((head, rest)) = bytes.split_first_chunk() {
                field = *head;
                *bytes = rest;
            }
            field
        }
        let rest = &mut &bytes[..];
        Self {
            src_cid: u64::from_le_bytes(field(rest)),
            dst_cid: u64::from_le_bytes(field(rest)),
            src_port: u32::from_le_bytes(field(rest)),
            dst_port: u32::from_le_bytes(field(rest)),
            len: u32::from_le_bytes(field(rest)),
            kind: u16::from_le_bytes(field(rest)),
            operation: u16::from_le_bytes(field(rest)),
            flags: u32::from_le_bytes(field(rest)),
            buf_alloc: u32::from_le_bytes(field(rest)),
            fwd_cnt: u32::from_le_bytes(field(rest)),
        }
    }

    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.operation.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_laid_out_as_the_specification_says() {
        let bytes: [u8; HEADER_BYTES] = std::array::from_fn(|index| index as u8);
        let header = Header::decode(&bytes);
        assert_eq!((header.src_cid, header.src_port), (0x0706_0504_0302_0100, 0x1312_1110));
        assert_eq!((header.kind, header.operation), (0x1d1c, 0x1f1e));
        assert_eq!((header.len, header.fwd_cnt), (0x1b1a_1918, 0x2b2a_2928));
        assert_eq!(header.encode(), bytes);
        assert_eq!(Operation::from_wire(7), Some(Operation::CreditRequest));
        assert_eq!((Operation::from_wire(0), Operation::from_wire(8)), (None, None));
    }
}
