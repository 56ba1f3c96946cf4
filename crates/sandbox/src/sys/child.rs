//! Starts children that share this process's memory for as long as they are ours, as vfork's do.
//!
//! A copy of a process is dear where it has threads and much memory: its page tables are copied, and afterwards each page
//! that is written costs a fault and a word to the other CPUs. These children copy nothing. So they have a stack of their
//! own, catch no signal, and make nothing but system calls. On architectures whose few lines of assembly nobody has
//! written they are copies after all.

use std::ffi::c_void;
use std::io;
use std::mem::MaybeUninit;

/// Catches no signal: a handler would run in memory that is not the child's. From linux/sched.h; `libc` cuts it off to an
/// `int`.
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
/// More than system calls and their wrappers need.
const STACK_BYTES: usize = 32 << 10;

/// What a child does. It never returns, and may not touch what another thread can hold locked.
pub type Entry = unsafe extern "C" fn(*const c_void) -> !;

/// The child's stack. It has to live until the child has ended or is another program.
pub struct Stack(Box<[MaybeUninit<u128>]>);

impl Stack {
    pub fn new() -> Self {
        // Of 16 bytes each, as a stack is aligned.
        Self(Box::new_uninit_slice(STACK_BYTES / size_of::<u128>()))
    }
}

/// clone3(2) with `flags` and what else `how` asks for. Returns the child's id.
///
/// # Safety
///
/// `how` has to be valid for clone3, and `entry` and `argument` for the child, until that has ended or is another
/// program. Without `CLONE_VFORK` in `flags` the caller sees to that.
pub unsafe fn start(
    mut how: libc::clone_args,
    stack: &mut Stack,
    entry: Entry,
    argument: *const c_void,
) -> io::Result<libc::pid_t> {
    how.exit_signal = libc::SIGCHLD as u64;
    how.flags |= CLONE_CLEAR_SIGHAND;
    // SAFETY: the caller's.
    let result = unsafe { clone3(&mut how, stack, entry, argument) };
    // Process ids and error codes fit in 32 bits.
    let result = result as libc::c_int;
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
}

#[cfg(target_arch = "x86_64")]
unsafe fn clone3(
    how: &mut libc::clone_args,
    stack: &mut Stack,
    entry: Entry,
    argument: *const c_void,
) -> libc::c_long {
    how.flags |= libc::CLONE_VM as u64;
    how.stack = stack.0.as_mut_ptr() as u64;
    how.stack_size = size_of_val(&*stack.0) as u64;
    let result;
    // SAFETY: the parent comes out of it as out of any system call, with its own stack untouched. The child begins at the
    // top of `stack`, which is aligned, calls `entry` there and never gets to what follows.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            // The end of the chain of frames.
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") how,
            in("rsi") size_of::<libc::clone_args>(),
            in("r12") argument,
            in("r13") entry,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn clone3(
    how: &mut libc::clone_args,
    _: &mut Stack,
    entry: Entry,
    argument: *const c_void,
) -> libc::c_long {
    // A copy does not keep its parent waiting.
    how.flags &= !(libc::CLONE_VFORK as u64);
    // SAFETY: `how` is a clone_args of the size that is told; the child has its own copy of all memory.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut *how, size_of::<libc::clone_args>()) };
    match result {
        // SAFETY: this is the child, to which the caller's promise goes.
        0 => unsafe { entry(argument) },
        // SAFETY: errno is this thread's own.
        -1 => libc::c_long::from(-unsafe { *libc::__errno_location() }),
        pid => pid,
    }
}
