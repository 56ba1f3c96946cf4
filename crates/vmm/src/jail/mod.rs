//! Takes from the machine's threads what they have no need of, so that a guest that takes one over gains nothing.

pub mod seccomp;
