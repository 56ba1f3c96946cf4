//! Builds netlink messages and has the kernel carry them out (netlink(7)).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::sys;

const HEADER_BYTES: usize = 16;
/// `NLA_F_NESTED`.
const NESTED: u16 = 1 << 15;

/// One message under construction. Everything in it is aligned to four bytes.
#[derive(Debug, Clone)]
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// `flags` beside NLM_F_REQUEST.
    pub fn new(kind: u16, flags: libc::c_int) -> Self {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        // All NLM_F_* fit in 16 bits.
        let flags = (flags | libc::NLM_F_REQUEST) as u16;
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        Self { bytes }
    }

    fn wants_answer(&self) -> bool {
        let flags = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]);
        flags & libc::NLM_F_ACK as u16 != 0
    }

    /// The family's own header, behind netlink's.
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.append(bytes);
        self
    }

    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (4 + value.len()) as u16;
        self.append(&[length.to_ne_bytes(), kind.to_ne_bytes()].concat());
        self.append(value);
        self
    }

    /// Netlink's text ends with NUL.
    pub fn text(self, kind: u16, value: &str) -> Self {
        self.attribute(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// nf_tables has its numbers in network order.
    pub fn big_endian(self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_be_bytes())
    }

    pub fn nested(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self.append(&[0, 0, 0, 0]);
        let mut filled = fill(self);
        // Nothing built here comes near 64 KiB.
        let length = (filled.bytes.len() - start) as u16;
        filled.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        filled.bytes[start + 2..start + 4].copy_from_slice(&(kind | NESTED).to_ne_bytes());
        filled
    }

    fn append(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = self.bytes.len() as u32;
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// A conversation with the kernel, in the network namespace in which it was opened.
#[derive(Debug)]
pub struct Socket(File);

impl Socket {
    /// To links, addresses, routes.
    pub fn route() -> io::Result<Self> {
        sys::netlink(libc::NETLINK_ROUTE).map(Self::from)
    }

    /// To the packet filter.
    pub fn netfilter() -> io::Result<Self> {
        sys::netlink(libc::NETLINK_NETFILTER).map(Self::from)
    }

    /// Sends messages as one, and waits until the kernel has answered those that want it.
    pub fn carry_out(&self, messages: Vec<Message>) -> io::Result<()> {
        let mut answers = messages.iter().filter(|message| message.wants_answer()).count();
        let bytes: Vec<u8> =
            (1u32..).zip(messages).flat_map(|(sequence, message)| message.finish(sequence)).collect();
        (&self.0).write_all(&bytes)?;
        while answers > 0 {
            self.each_answer(|kind, payload| {
                if i32::from(kind) == libc::NLMSG_ERROR {
                    answers = answers.saturating_sub(1);
                    return answer_to_result(payload);
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Asks for one thing; returns the payload of the answer.
    pub fn ask(&self, message: Message) -> io::Result<Vec<u8>> {
        (&self.0).write_all(&message.finish(1))?;
        let mut found = None;
        while found.is_none() {
            self.each_answer(|kind, payload| {
                if i32::from(kind) == libc::NLMSG_ERROR {
                    answer_to_result(payload)?;
                }
                found = Some(payload.to_vec());
                Ok(())
            })?;
        }
        Ok(found.unwrap_or_default())
    }

    /// Takes each message of one read, with its kind; one that does not block says `WouldBlock`.
    pub fn each_answer(&self, mut take: impl FnMut(u16, &[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut buffer = vec![0; 32 << 10];
        let count = (&self.0).read(&mut buffer)?;
        let mut rest = &buffer[..count];
        while let Some((head, _)) = rest.split_first_chunk::<HEADER_BYTES>() {
            let length = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
            let kind = u16::from_ne_bytes([head[4], head[5]]);
            let payload = rest.get(HEADER_BYTES..length).ok_or(io::ErrorKind::InvalidData)?;
            take(kind, payload)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Socket {
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

/// An NLMSG_ERROR begins with a negative errno, or 0.
fn answer_to_result(payload: &[u8]) -> io::Result<()> {
    let code =
        payload.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes)).ok_or(io::ErrorKind::InvalidData)?;
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_laid_out_as_the_kernel_reads_it() {
        let message = Message::new(0x10, libc::NLM_F_ACK)
            .raw(&[1, 2, 3, 4, 5])
            .nested(18, |nest| nest.text(1, "veth").big_endian(2, 1));
        assert!(message.wants_answer());
        let bytes = message.finish(7);
        let expected: [&[u8]; 6] = [
            &[48, 0, 0, 0, 0x10, 0, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0],
            &[1, 2, 3, 4, 5, 0, 0, 0],
            &[24, 0, 18, 0x80],
            &[9, 0, 1, 0, b'v', b'e', b't', b'h', 0, 0, 0, 0],
            &[8, 0, 2, 0],
            &[0, 0, 0, 1],
        ];
        if cfg!(target_endian = "little") {
            assert_eq!(bytes, expected.concat());
        }
    }
}
