//! Takes from the threads that a guest can influence what they do not need.

pub mod calls;
