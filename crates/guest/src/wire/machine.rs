//! Names what the init of a machine and whoever starts the machine have to agree on.
//!
//! ```text
//! /dev/vda    the root, a squashfs; only read
//! /dev/vdb    the scratch disk, an ext4 file system; where there is none, what is written takes memory
//! ```

/// Key of the kernel's command line: the port on which the host (CID 2) is called.
pub const PORT_KEY: &str = "sealci.port";

/// The host's context id (vsock(7)).
pub const HOST_CID: u32 = 2;

/// An empty folder for the action's files, root's.
pub const WORKSPACE: &str = "/workspace";

/// An empty folder for what the init and its shell pass to each other (`Start::scratch`), root's alone.
pub const SCRATCH: &str = "/run/sealci";
