//! Makes and serves real repositories, for the tests of whoever works with some. Not for production.

mod repository;
mod smart_http;

pub use repository::Repository;
pub use smart_http::{Mode, SmartHttp};
