//! Chooses agents for attempts: the scheduler service.

pub mod placement;
pub mod pool;
pub mod queue;
pub mod requirements;
mod why;
