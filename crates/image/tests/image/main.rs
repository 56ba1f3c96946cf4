//! Obtains real images, from Debian's own registry server, from folders and files, and hostile ones made by hand.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod as_user;
mod hostile;
mod keeping;
mod lab;
mod lying;
mod registry;
mod scripted;
