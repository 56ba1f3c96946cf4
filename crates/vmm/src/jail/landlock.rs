//! Forbids this thread, and those it starts, every way into a file system, by the kernel's landlock(7).

use std::io;

/// `struct landlock_ruleset_attr` of Linux 6.12; older kernels know the front of it.
#[repr(C)]
struct Ruleset {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const ASK_VERSION: libc::c_uint = 1;

impl Ruleset {
    /// All that this version of the kernel's can forbid, and how many bytes of it the kernel knows.
    fn all(version: i64) -> (Self, usize) {
        let rights = match version {
            ..=1 => 13,
            2 => 14,
            3 | 4 => 15,
            _ => 16,
        };
        let handled_access_fs = (1 << rights) - 1;
        // Binding and connecting by TCP; abstract sockets and signals to others.
        let handled_access_net = if version >= 4 { 0b11 } else { 0 };
        let scoped = if version >= 6 { 0b11 } else { 0 };
        let words = 1 + usize::from(version >= 4) + usize::from(version >= 6);
        (Self { handled_access_fs, handled_access_net, scoped }, words * size_of::<u64>())
    }
}

/// False where the kernel has none, or has it turned off.
pub fn forbid_all() -> io::Result<bool> {
    // SAFETY: it reads no memory where it is asked for its version.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, ASK_VERSION) };
    if version < 0 {
        let error = io::Error::last_os_error();
        let is_absent = matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP));
        return if is_absent { Ok(false) } else { Err(error) };
    }
    let (ruleset, bytes) = Ruleset::all(version);
    // SAFETY: it reads so many bytes of the ruleset, which has at least as many.
    let rules = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const ruleset, bytes, 0) };
    if rules < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: neither call touches memory, and nobody else has the descriptor.
    let bound = unsafe {
        let bound = libc::syscall(libc::SYS_landlock_restrict_self, rules, 0);
        libc::close(rules as libc::c_int);
        bound
    };
    if bound == 0 { Ok(true) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::thread;

    #[test]
    fn what_a_kernel_does_not_know_is_not_asked_of_it() {
        let (first, bytes) = Ruleset::all(1);
        assert_eq!((first.handled_access_fs, bytes), (0x1fff, 8));
        let (latest, bytes) = Ruleset::all(7);
        assert_eq!((latest.handled_access_fs, latest.scoped, bytes), (0xffff, 3, 24));
        assert_eq!(Ruleset::all(4).1, 16);
    }

    #[test]
    fn no_file_can_be_opened_any_more() {
        let bound = thread::spawn(|| (forbid_all().unwrap(), File::open("/dev/null").is_ok()));
        let (is_bound, can_open) = bound.join().unwrap();
        // Where the kernel has none, the cell is without it.
        assert_ne!(is_bound, can_open);
    }
}
