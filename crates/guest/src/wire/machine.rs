//! Names what the init of a machine and whoever starts the machine have to agree on.
//!
//! ```text
//! /dev/vda    the root, a squashfs; only read
//! /dev/vdb    the scratch disk, an ext4 file system; where there is none, what is written takes memory
//! /dev/vdc …  the roots of services, in their order: each a squashfs, and only read
//! ```

/// Key of the kernel's command line: the port on which the host (CID 2) is called.
pub const PORT_KEY: &str = "sealci.port";

/// Key of the kernel's command line: a port of the host's that nobody answers. It is called when all is done that does not depend on
/// what will run, so that the machine can be saved then: who goes on from that finds the call refused. Nothing secret is in it.
pub const SNAPSHOT_KEY: &str = "sealci.snapshot";

/// The host's context id (vsock(7)).
pub const HOST_CID: u32 = 2;

/// As many services fit into a machine beside its action: each takes a disk, and a monitor has room for so many more devices.
pub const MOST_SERVICES: usize = 13;

/// The host's port that a service's init calls, by the one that the machine calls: each its own, and with room for others between.
pub fn service_port(port: u32, service: usize) -> u32 {
    port.saturating_add(0x100).saturating_add(service as u32)
}

/// The disk with a service's root.
pub fn service_disk(service: usize) -> String {
    let letter = char::from(b'c'.saturating_add(u8::try_from(service).unwrap_or(u8::MAX)));
    format!("/dev/vd{letter}")
}

/// An empty folder for the action's files, root's.
pub const WORKSPACE: &str = "/workspace";

/// An empty folder for what the init and its shell pass to each other (`Start::scratch`), root's alone.
pub const SCRATCH: &str = "/run/sealci";
