//! The program `peer PORT` of the tests' guests: connects to a port of CID 2 (vsock(7)), sends what it reads, then prints
//! what comes back. It is built alone, without crates, as a static program.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;

const AF_VSOCK: i32 = 40;
const SOCK_STREAM: i32 = 1;
const SHUT_WR: i32 = 1;
/// `SO_VM_SOCKETS_CONNECT_TIMEOUT`: whoever is saved waits for as long as that takes, which a busy machine makes long.
const CONNECT_TIMEOUT: i32 = 6;
const PATIENCE: [i64; 2] = [60, 0];
const HOST: u32 = 2;

/// `struct sockaddr_vm` of linux/vm_sockets.h.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

unsafe extern "C" {
    fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
    fn setsockopt(socket: i32, level: i32, name: i32, value: *const [i64; 2], bytes: u32) -> i32;
    fn connect(socket: i32, address: *const Address, bytes: u32) -> i32;
    fn shutdown(socket: i32, how: i32) -> i32;
}

fn main() -> io::Result<()> {
    let port = std::env::args().nth(1).and_then(|text| text.parse().ok()).expect("peer PORT");
    let address = Address { family: AF_VSOCK as u16, reserved: 0, port, cid: HOST, zero: [0; 4] };
    // SAFETY: the address and the time live as long as the calls, and their sizes are given.
    let descriptor = unsafe {
        let descriptor = socket(AF_VSOCK, SOCK_STREAM, 0);
        setsockopt(descriptor, AF_VSOCK, CONNECT_TIMEOUT, &PATIENCE, size_of_val(&PATIENCE) as u32);
        if descriptor < 0 || connect(descriptor, &address, size_of::<Address>() as u32) < 0 {
            return Err(io::Error::last_os_error());
        }
        descriptor
    };
    // SAFETY: it is open and nobody else's; the process's end closes it.
    let mut peer = ManuallyDrop::new(unsafe { File::from_raw_fd(descriptor) });
    io::copy(&mut io::stdin().lock(), &mut *peer)?;
    // SAFETY: it has no memory to be wrong about.
    if unsafe { shutdown(descriptor, SHUT_WR) } < 0 {
        return Err(io::Error::last_os_error());
    }
    io::copy(&mut *peer, &mut io::stdout().lock())?;
    Ok(())
}
