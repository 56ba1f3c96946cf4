//! Decides which system calls an action may make: those on a list, and of these not the ones that would enter or make
//! namespaces, or talk to the hypervisor.
//!
//! Two filters stand one behind the other; the kernel takes the stricter answer. The first lets through what is listed, and
//! says ENOSYS to all else, so that programs take their older way (a C library without `clone3` uses `clone`); it also
//! refuses the x32 calls, whose numbers are none of these. The second says EPERM to what is listed but depends on its
//! arguments or on privileges that nobody inside has.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("it does not compile")]
    Compile(#[from] BackendError),
    #[error("the kernel does not take it")]
    Apply(#[from] seccompiler::Error),
}

/// Both filters, compiled.
#[derive(Debug, Clone)]
pub struct Filters {
    refused: BpfProgram,
    allowed: BpfProgram,
}

impl Filters {
    /// Compiles them for this machine.
    pub fn compile() -> Result<Self, SeccompError> {
        let arch = TargetArch::try_from(std::env::consts::ARCH)?;
        let errno = |errno: i32| SeccompAction::Errno(errno.unsigned_abs());
        // What the second filter refuses has to pass the first.
        let allowed =
            [COMMON_CALLS, ARCHITECTURE_CALLS, REFUSED].concat().into_iter().map(|call| (call, Vec::new()));
        let allowed = SeccompFilter::new(allowed.collect(), errno(libc::ENOSYS), SeccompAction::Allow, arch)?;
        let refused = SeccompFilter::new(refusals()?, SeccompAction::Allow, errno(libc::EPERM), arch)?;
        Ok(Self { refused: refused.try_into()?, allowed: allowed.try_into()? })
    }

    /// Binds this thread, and all that comes of it, for good.
    pub fn apply(&self) -> Result<(), SeccompError> {
        seccompiler::apply_filter(&self.refused)?;
        seccompiler::apply_filter(&self.allowed)?;
        Ok(())
    }
}

/// Binds this process, for good, to what a gatekeeper does: it waits, speaks by the sockets that it has and by new ones of IPv4,
/// and writes to the files that it has.
pub fn bind_gatekeeper() -> Result<(), SeccompError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let only = |argument: u8, value: u64| {
        let is_it = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?;
        Ok::<_, BackendError>(vec![SeccompRule::new(vec![is_it])?])
    };
    let calls = [GATEKEEPER_CALLS, GATEKEEPER_ARCHITECTURE_CALLS].concat();
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        calls.into_iter().map(|call| (call, Vec::new())).collect();
    // Both are positive.
    rules.insert(libc::SYS_socket, only(0, libc::AF_INET as u64)?);
    rules.insert(libc::SYS_ioctl, only(1, libc::FIONBIO)?);
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let program: BpfProgram = SeccompFilter::new(rules, refused, SeccompAction::Allow, arch)?.try_into()?;
    seccompiler::apply_filter(&program)?;
    Ok(())
}

/// Namespaces of any kind (clone(2)).
const NAMESPACE_FLAGS: [libc::c_int; 8] = [
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWUTS,
    // CLONE_NEWTIME, for unshare alone; in clone its bit is part of the exit signal, which is never that high.
    0x80,
];

/// Kernel crypto and the hypervisor's sockets: large, and nobody's need.
const SOCKET_FAMILIES: [libc::c_int; 2] = [libc::AF_ALG, libc::AF_VSOCK];

fn refusals() -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let word = SeccompCmpArgLen::Dword;
    // All of these constants are positive.
    let rule = |argument: u8, operator: SeccompCmpOp, value: libc::c_int| {
        SeccompRule::new(vec![SeccompCondition::new(argument, word.clone(), operator, value as u64)?])
    };
    for call in [libc::SYS_clone, libc::SYS_unshare] {
        let bits = NAMESPACE_FLAGS.iter().map(|flag| rule(0, SeccompCmpOp::MaskedEq(*flag as u64), *flag));
        rules.insert(call, bits.collect::<Result<_, _>>()?);
    }
    let families = SOCKET_FAMILIES.iter().map(|family| rule(0, SeccompCmpOp::Eq, *family));
    rules.insert(libc::SYS_socket, families.collect::<Result<_, _>>()?);
    // Typing into a terminal that others read.
    let commands =
        [libc::TIOCSTI, libc::TIOCLINUX].map(|command| rule(1, SeccompCmpOp::Eq, command as libc::c_int));
    rules.insert(libc::SYS_ioctl, commands.into_iter().collect::<Result<_, _>>()?);
    Ok(rules)
}

/// Known, and never for an action: EPERM tells more than ENOSYS.
const REFUSED: &[i64] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pivot_root,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
];

macro_rules! calls {
    ($($name:ident)*) => { &[$(libc::$name),*] };
}

const GATEKEEPER_CALLS: &[i64] = calls! {
    SYS_accept4 SYS_bind SYS_brk SYS_clock_gettime SYS_close SYS_connect SYS_exit SYS_exit_group SYS_fcntl SYS_futex
    SYS_getrandom SYS_madvise SYS_mmap SYS_mremap SYS_munmap SYS_ppoll SYS_pwrite64 SYS_read SYS_recvfrom SYS_recvmsg
    SYS_restart_syscall SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sendto SYS_sigaltstack SYS_write SYS_writev
};
#[cfg(target_arch = "x86_64")]
const GATEKEEPER_ARCHITECTURE_CALLS: &[i64] = calls! { SYS_poll };
#[cfg(not(target_arch = "x86_64"))]
const GATEKEEPER_ARCHITECTURE_CALLS: &[i64] = &[];

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE_CALLS: &[i64] = calls! {
    SYS_access SYS_alarm SYS_arch_prctl SYS_chmod SYS_chown SYS_creat SYS_dup2 SYS_epoll_create SYS_epoll_wait SYS_eventfd
    SYS_fork SYS_futimesat SYS_getdents SYS_getpgrp SYS_inotify_init SYS_lchown SYS_link SYS_lstat SYS_mkdir SYS_mknod
    SYS_open SYS_pause SYS_pipe SYS_poll SYS_readlink SYS_rename SYS_rmdir SYS_select SYS_signalfd SYS_stat SYS_symlink
    SYS_time SYS_unlink SYS_utime SYS_utimes SYS_vfork SYS_uselib SYS_ustat SYS_sysfs SYS_modify_ldt
};
#[cfg(not(target_arch = "x86_64"))]
const ARCHITECTURE_CALLS: &[i64] = &[];

/// What programs need; none of it reaches past the namespaces and limits they are in.
const COMMON_CALLS: &[i64] = calls! {
    SYS_accept SYS_accept4 SYS_adjtimex SYS_bind SYS_brk SYS_capget SYS_capset SYS_chdir SYS_clock_adjtime SYS_clock_getres
    SYS_clock_gettime SYS_clock_nanosleep SYS_clone SYS_close SYS_close_range SYS_connect SYS_copy_file_range SYS_dup
    SYS_dup3 SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_epoll_pwait2 SYS_eventfd2 SYS_execve SYS_execveat
    SYS_exit SYS_exit_group SYS_faccessat SYS_faccessat2 SYS_fadvise64 SYS_fallocate SYS_fchdir SYS_fchmod SYS_fchmodat
    SYS_fchown SYS_fchownat SYS_fcntl SYS_fdatasync SYS_fgetxattr SYS_flistxattr SYS_flock SYS_fremovexattr
    SYS_fsetxattr SYS_fstat SYS_fstatfs SYS_fsync SYS_ftruncate SYS_futex SYS_futex_waitv SYS_get_mempolicy
    SYS_get_robust_list SYS_getcpu SYS_getcwd SYS_getdents64 SYS_getegid SYS_geteuid SYS_getgid SYS_getgroups
    SYS_getitimer SYS_getpeername SYS_getpgid SYS_getpid SYS_getppid SYS_getpriority SYS_getrandom SYS_getresgid
    SYS_getresuid SYS_getrlimit SYS_getrusage SYS_getsid SYS_getsockname SYS_getsockopt SYS_gettid SYS_gettimeofday
    SYS_getuid SYS_getxattr SYS_inotify_add_watch SYS_inotify_init1 SYS_inotify_rm_watch SYS_io_cancel SYS_io_destroy
    SYS_io_getevents SYS_io_setup SYS_io_submit SYS_ioctl SYS_ioprio_get SYS_ioprio_set SYS_kcmp SYS_kill
    SYS_landlock_add_rule SYS_landlock_create_ruleset SYS_landlock_restrict_self SYS_lgetxattr SYS_linkat SYS_listen
    SYS_listxattr SYS_llistxattr SYS_lremovexattr SYS_lseek SYS_lsetxattr SYS_madvise SYS_mbind SYS_membarrier
    SYS_memfd_create SYS_memfd_secret SYS_mincore SYS_mkdirat SYS_mknodat SYS_mlock SYS_mlock2 SYS_mlockall SYS_mmap
    SYS_mprotect SYS_mq_getsetattr SYS_mq_notify SYS_mq_open SYS_mq_timedreceive SYS_mq_timedsend SYS_mq_unlink
    SYS_mremap SYS_msgctl SYS_msgget SYS_msgrcv SYS_msgsnd SYS_msync SYS_munlock SYS_munlockall SYS_munmap
    SYS_name_to_handle_at SYS_nanosleep SYS_newfstatat SYS_openat SYS_openat2 SYS_personality SYS_pidfd_getfd
    SYS_pidfd_open SYS_pidfd_send_signal SYS_pipe2 SYS_pkey_alloc SYS_pkey_free SYS_pkey_mprotect SYS_ppoll SYS_prctl
    SYS_pread64 SYS_preadv SYS_preadv2 SYS_prlimit64 SYS_process_madvise SYS_process_mrelease SYS_process_vm_readv
    SYS_process_vm_writev SYS_pselect6 SYS_ptrace SYS_pwrite64 SYS_pwritev SYS_pwritev2 SYS_read SYS_readahead
    SYS_readlinkat SYS_readv SYS_recvfrom SYS_recvmmsg SYS_recvmsg SYS_remap_file_pages SYS_removexattr SYS_renameat
    SYS_renameat2 SYS_restart_syscall SYS_rseq SYS_rt_sigaction SYS_rt_sigpending SYS_rt_sigprocmask
    SYS_rt_sigqueueinfo SYS_rt_sigreturn SYS_rt_sigsuspend SYS_rt_sigtimedwait SYS_rt_tgsigqueueinfo
    SYS_sched_get_priority_max SYS_sched_get_priority_min SYS_sched_getaffinity SYS_sched_getattr SYS_sched_getparam
    SYS_sched_getscheduler SYS_sched_rr_get_interval SYS_sched_setaffinity SYS_sched_setattr SYS_sched_setparam
    SYS_sched_setscheduler SYS_sched_yield SYS_seccomp SYS_semctl SYS_semget SYS_semop SYS_semtimedop SYS_sendfile
    SYS_sendmmsg SYS_sendmsg SYS_sendto SYS_set_mempolicy SYS_set_robust_list SYS_set_tid_address SYS_setfsgid
    SYS_setfsuid SYS_setgid SYS_setgroups SYS_setitimer SYS_setpgid SYS_setpriority SYS_setregid SYS_setresgid
    SYS_setresuid SYS_setreuid SYS_setrlimit SYS_setsid SYS_setsockopt SYS_setuid SYS_setxattr SYS_shmat SYS_shmctl
    SYS_shmdt SYS_shmget SYS_shutdown SYS_sigaltstack SYS_signalfd4 SYS_socket SYS_socketpair SYS_splice SYS_statfs
    SYS_statx SYS_symlinkat SYS_sync SYS_sync_file_range SYS_syncfs SYS_sysinfo SYS_tee SYS_tgkill SYS_timer_create
    SYS_timer_delete SYS_timer_getoverrun SYS_timer_gettime SYS_timer_settime SYS_timerfd_create SYS_timerfd_gettime
    SYS_timerfd_settime SYS_times SYS_tkill SYS_truncate SYS_umask SYS_uname SYS_unlinkat SYS_unshare SYS_utimensat
    SYS_vmsplice SYS_wait4 SYS_waitid SYS_write SYS_writev
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filters_compile() {
        let filters = Filters::compile().unwrap();
        assert!(!filters.allowed.is_empty() && !filters.refused.is_empty());
    }
}
