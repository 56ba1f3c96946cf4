//! x
pub mod dispatch;
pub mod store;
pub mod watchers;
