//! Decides which system calls a thread of the machine may make: the few of its work, and of these only with the arguments that
//! it uses. Any other ends the whole process at once.
//!
//! A filter is compiled before the thread is started and applied first thing in it: starting a thread takes calls that none
//! needs later. Descriptors are not told apart: a thread can use what the process has open, and can open nothing.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Why a thread has no filter.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("a thread's filter of system calls does not compile")]
    Compile(#[from] BackendError),
    #[error("the kernel does not take a thread's filter of system calls")]
    Apply(#[from] seccompiler::Error),
}

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs a virtual CPU, and carries its accesses to registers.
    Vcpu,
    /// Works for all devices.
    Devices,
    /// Has started the others, and waits for the guest's end.
    Main,
}

/// A thread's filter, compiled.
#[derive(Debug, Clone)]
pub struct Filter(BpfProgram);

impl Filter {
    pub fn compile(role: Role) -> Result<Self, SeccompError> {
        let arch = TargetArch::try_from(std::env::consts::ARCH)?;
        let filter =
            SeccompFilter::new(rules(role)?, SeccompAction::KillProcess, SeccompAction::Allow, arch)?;
        Ok(Self(filter.try_into()?))
    }

    /// Binds this thread for good.
    pub fn apply(&self) -> Result<(), SeccompError> {
        Ok(seccompiler::apply_filter(&self.0)?)
    }
}

/// KVM's call that enters the guest: `_IO(KVMIO, 0x80)`.
const KVM_RUN: u64 = 0xae80;

/// What every thread's memory, locks, signals and end take.
const COMMON_CALLS: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_futex,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_munmap,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    // An interrupt is a write to an eventfd.
    libc::SYS_write,
];

const VCPU_CALLS: &[i64] = &[libc::SYS_ioctl];

const DEVICES_CALLS: &[i64] = &[
    libc::SYS_connect,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_getrandom,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_socket,
    libc::SYS_writev,
];

const MAIN_CALLS: &[i64] = &[
    libc::SYS_exit_group,
    libc::SYS_getpid,
    // Others are told to end by a signal.
    libc::SYS_tgkill,
];

fn calls(role: Role) -> Vec<i64> {
    let own = match role {
        Role::Vcpu => VCPU_CALLS,
        Role::Devices => DEVICES_CALLS,
        Role::Main => MAIN_CALLS,
    };
    // Before it closes a descriptor, a debug build asks whether it is open.
    let debug: &[i64] = if cfg!(debug_assertions) { &[libc::SYS_fcntl] } else { &[] };
    [COMMON_CALLS, own, debug].concat()
}

fn rules(role: Role) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    calls(role).into_iter().map(|call| Ok((call, arguments(call)?))).collect()
}

/// The arguments that a call may have; none are any.
fn arguments(call: i64) -> Result<Vec<SeccompRule>, BackendError> {
    let is = |argument: u8, value: u64| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
    };
    let has = |argument: u8, mask: libc::c_int, value: libc::c_int| {
        // These constants are positive.
        let masked = SeccompCmpOp::MaskedEq(mask as u64);
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, masked, value as u64)
    };
    let conditions = match call {
        libc::SYS_ioctl => vec![is(1, KVM_RUN)?],
        libc::SYS_fcntl => vec![is(1, libc::F_GETFD as u64)?],
        // Memory of its own, that is never run.
        libc::SYS_mmap => {
            vec![has(2, libc::PROT_EXEC, 0)?, has(3, libc::MAP_ANONYMOUS, libc::MAP_ANONYMOUS)?]
        }
        libc::SYS_mprotect => vec![has(2, libc::PROT_EXEC, 0)?],
        libc::SYS_madvise => vec![is(2, libc::MADV_DONTNEED as u64)?],
        libc::SYS_socket => vec![is(0, libc::AF_UNIX as u64)?],
        _ => return Ok(Vec::new()),
    };
    Ok(vec![SeccompRule::new(conditions)?])
}

#[cfg(test)]
mod tests;
