//! Decides which system calls the machine's threads may make once a guest runs; any other ends the whole process.
//!
//! Each thread binds itself as the first thing it does, when it has been made: the C library's first `pthread_create` makes
//! calls that no thread needs afterwards. The one that has made them follows, so that nothing in the process can open a
//! file or start a program any more.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use thiserror::Error;

/// `KVM_RUN` of linux/kvm.h: the one request that a virtual CPU's thread makes.
const KVM_RUN: u64 = 0xae80;

/// What any thread needs: to take and give back memory, to wait for another thread, and to end.
const COMMON: [libc::c_long; 11] = [
    libc::SYS_brk,
    libc::SYS_exit,
    libc::SYS_futex,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_munmap,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    // Interrupts, and the serial line's output.
    libc::SYS_write,
];

/// A virtual CPU is kicked by a signal, and a device that is reset closes its sockets.
const VCPU: [libc::c_long; 3] = [libc::SYS_close, libc::SYS_epoll_ctl, libc::SYS_rt_sigreturn];

/// Of disks, of sockets, and of what is waited for.
const DEVICES: [libc::c_long; 17] = [
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_getrandom,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

/// Whoever waits for the guest's end makes the others end, then the process.
const MAIN: [libc::c_long; 4] = [libc::SYS_close, libc::SYS_exit_group, libc::SYS_getpid, libc::SYS_tgkill];

/// With debug assertions, Rust's library looks at each descriptor before it closes it.
const DEBUGGING: &[libc::c_long] = if cfg!(debug_assertions) { &[libc::SYS_fcntl] } else { &[] };

/// Why threads cannot be bound.
#[derive(Debug, Error)]
pub enum CallsError {
    #[error("the filter of system calls does not compile")]
    Compile(#[from] BackendError),
    #[error("the kernel takes no filter of system calls: it needs CONFIG_SECCOMP_FILTER")]
    Apply(#[from] seccompiler::Error),
}

/// A kind of thread's filter, compiled.
#[derive(Debug, Clone)]
pub struct Calls(BpfProgram);

impl Calls {
    pub fn of_vcpu() -> Result<Self, CallsError> {
        let run = only(1, KVM_RUN)?;
        Self::compile(COMMON.iter().chain(&VCPU), [(libc::SYS_ioctl, run)])
    }

    pub fn of_devices() -> Result<Self, CallsError> {
        let unix = only(0, libc::AF_UNIX as u64)?;
        Self::compile(COMMON.iter().chain(&DEVICES), [(libc::SYS_socket, unix)])
    }

    pub fn of_main() -> Result<Self, CallsError> {
        Self::compile(COMMON.iter().chain(&MAIN), [])
    }

    /// Binds this thread for good.
    pub fn bind(&self) -> Result<(), CallsError> {
        Ok(seccompiler::apply_filter(&self.0)?)
    }

    /// Those that are made with any arguments, and those with some.
    fn compile<'a, const N: usize>(
        all: impl Iterator<Item = &'a libc::c_long>,
        some: [(libc::c_long, Vec<SeccompRule>); N],
    ) -> Result<Self, CallsError> {
        let rules: BTreeMap<_, _> =
            all.chain(DEBUGGING).map(|call| (*call, Vec::new())).chain(some).collect();
        let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
        let filter =
            SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, architecture)?;
        Ok(Self(filter.try_into()?))
    }
}

/// An argument, counted from 0, has to have this value.
fn only(argument: u8, value: u64) -> Result<Vec<SeccompRule>, BackendError> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?;
    Ok(vec![SeccompRule::new(vec![condition])?])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With the one whose arguments are looked at.
    #[test]
    fn the_lists_are_short() {
        assert!(COMMON.len() + VCPU.len() < 15);
        assert!(COMMON.len() + DEVICES.len() < 35);
        Calls::of_vcpu().unwrap();
        Calls::of_devices().unwrap();
        Calls::of_main().unwrap();
    }
}
