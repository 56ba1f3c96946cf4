//! Lets go of what a process has no need of.

use std::collections::HashSet;
use std::io;
use std::ptr;

use caps::{CapSet, Capability};

use super::check;

/// Nobody's, on Debian and elsewhere.
const NOBODY: u32 = 65_534;

/// Keeps of this process's privileges that over its networks alone, for good; as nobody where `can_be_nobody`. To be called in a
/// process with one thread.
pub fn keep_network_only(can_be_nobody: bool) -> io::Result<()> {
    let network = HashSet::from([Capability::CAP_NET_ADMIN]);
    if can_be_nobody {
        // SAFETY: all take integers, and setgroups a null pointer for no groups. The C library has no other thread to tell.
        unsafe {
            check(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0).into())?;
            check(libc::setgroups(0, ptr::null()).into())?;
            check(libc::setresgid(NOBODY, NOBODY, NOBODY).into())?;
            check(libc::setresuid(NOBODY, NOBODY, NOBODY).into())?;
        }
    }
    // SAFETY: takes integers only.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &network).map_err(io::Error::other)?;
    }
    Ok(())
}
