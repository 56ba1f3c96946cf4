//! Moves bytes between descriptors and a guest's memory, without a copy between: all `unsafe` of the devices.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use super::Buffers;

/// How many pieces one call moves at most; who has more calls again.
const MOST_PIECES: usize = 64;

/// Makes taps, and opens them.
const TUNNEL_DEVICE: &str = "/dev/net/tun";

/// Opens a tap of this process's network namespace, as [`super::net`] has it. One that is not there is an error: nobody could
/// have connected it with anything.
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let text = CString::new(name)?;
    // SAFETY: a NUL-terminated string that lives over the call.
    if unsafe { libc::if_nametoindex(text.as_ptr()) } == 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // Names of interfaces are shorter by one byte, which ends them.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    let mut options = File::options();
    let device = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUNNEL_DEVICE)?;
    // SAFETY: the pointer is to an ifreq, which lives over the call; the device is open.
    if unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(device.into())
}

/// The pieces as the kernel takes them.
struct Pieces {
    vectors: [libc::iovec; MOST_PIECES],
    count: usize,
}

impl Pieces {
    fn of(buffers: &Buffers<'_>) -> Self {
        let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MOST_PIECES];
        let mut count = 0;
        for (vector, slice) in vectors.iter_mut().zip(buffers.slices()) {
            // The memory stays mapped for as long as the buffers borrow it, which is longer than this value lives.
            vector.iov_base = slice.ptr_guard_mut().as_ptr().cast();
            vector.iov_len = slice.len();
            count += 1;
        }
        Self { vectors, count }
    }
}

/// How many bytes a call moved; repeated when a signal came between.
fn moved(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(bytes) = usize::try_from(call()) {
            return Ok(bytes);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Reads from a file's offset into the guest; 0 bytes are the file's end.
pub fn read_at(file: BorrowedFd<'_>, offset: u64, into: &Buffers<'_>) -> io::Result<usize> {
    let pieces = Pieces::of(into);
    let offset = libc::off64_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: each vector is memory of the guest that is mapped to be written, and `into` borrows it; it is never a Rust
    // reference, so that the kernel and the guest may write it at any time.
    moved(|| unsafe {
        libc::preadv64(file.as_raw_fd(), pieces.vectors.as_ptr(), pieces.count as libc::c_int, offset)
    })
}

/// Writes the guest's bytes at a file's offset.
pub fn write_at(file: BorrowedFd<'_>, offset: u64, from: &Buffers<'_>) -> io::Result<usize> {
    let pieces = Pieces::of(from);
    let offset = libc::off64_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: as in `read_at`; the kernel only reads.
    moved(|| unsafe {
        libc::pwritev64(file.as_raw_fd(), pieces.vectors.as_ptr(), pieces.count as libc::c_int, offset)
    })
}

/// The header of a message whose bytes are these pieces.
fn message(pieces: &mut Pieces) -> libc::msghdr {
    // SAFETY: a header of zeros is one without an address, pieces or control data.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = pieces.vectors.as_mut_ptr();
    header.msg_iovlen = pieces.count as _;
    header
}

/// Sends the guest's bytes; never waits, and raises no signal when nobody is there any more.
pub fn send(socket: BorrowedFd<'_>, from: &Buffers<'_>) -> io::Result<usize> {
    let mut pieces = Pieces::of(from);
    let header = message(&mut pieces);
    // SAFETY: as in `write_at`; the header points to pieces that live until the call is over.
    moved(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &header, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) })
}

/// Receives into the guest; never waits. 0 bytes are the end.
pub fn receive(socket: BorrowedFd<'_>, into: &Buffers<'_>) -> io::Result<usize> {
    let mut pieces = Pieces::of(into);
    let mut header = message(&mut pieces);
    // SAFETY: as in `read_at`; the header points to pieces that live until the call is over.
    moved(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &mut header, libc::MSG_DONTWAIT) })
}

/// Gives the whole pages of these back to the host: they read as zeros next time, or as the file that is mapped there.
pub fn give_up(buffers: &Buffers<'_>) {
    // Not by rustix, which asks the kernel for it the first time: a call that a bound thread may not make.
    // SAFETY: it reads what the C library was told when the process began.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    for slice in buffers.slices() {
        let begin = slice.ptr_guard_mut().as_ptr();
        let skipped = begin.addr().next_multiple_of(page) - begin.addr();
        let bytes = slice.len().saturating_sub(skipped) / page * page;
        if bytes > 0 {
            // SAFETY: these pages are the guest's, mapped for longer than the buffers live, and no Rust reference ever points
            // into them. It is advice: what the kernel does not take leaves them as they are.
            unsafe { libc::madvise(begin.add(skipped).cast(), bytes, libc::MADV_DONTNEED) };
        }
    }
}

/// Reads one frame, or what there is, into the guest.
pub fn read(from: BorrowedFd<'_>, into: &Buffers<'_>) -> io::Result<usize> {
    let pieces = Pieces::of(into);
    // SAFETY: as in `read_at`.
    moved(|| unsafe { libc::readv(from.as_raw_fd(), pieces.vectors.as_ptr(), pieces.count as libc::c_int) })
}

/// Writes the guest's bytes as one frame.
pub fn write(to: BorrowedFd<'_>, from: &Buffers<'_>) -> io::Result<usize> {
    let pieces = Pieces::of(from);
    // SAFETY: as in `write_at`.
    moved(|| unsafe { libc::writev(to.as_raw_fd(), pieces.vectors.as_ptr(), pieces.count as libc::c_int) })
}
