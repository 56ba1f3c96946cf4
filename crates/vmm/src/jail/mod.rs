//! Takes from the process and its threads what they have no need of, so that a guest that takes one over gains nothing.
//!
//! `cell` is the process's: namespaces of its own, a root with nothing in it, the rights of nobody. `seccomp` is each thread's.

pub mod cell;
mod landlock;
pub mod seccomp;
