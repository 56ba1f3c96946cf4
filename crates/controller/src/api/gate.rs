//! Bounds what requests that make pipelines hold in memory: past it they are told to come again, before a byte of their body is
//! read.

use std::sync::Arc;

use axum::http::{HeaderMap, StatusCode, header};
use sealci_service::problem::Problem;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::MAX_BODY_BYTES;

/// The bodies under way have at most so many bytes together. A manifest's tree, its plan and rows take a few times as much.
const MOST_BYTES: usize = 32 << 20;

/// A request counts for no less: so there are at most 512 under way.
const LEAST_BYTES: usize = 64 << 10;

/// When one that was refused may come again.
const RETRY_SECONDS: &str = "1";

/// The one gate of a controller.
#[derive(Debug, Clone)]
pub struct Gate(Arc<Semaphore>);

impl Default for Gate {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MOST_BYTES / LEAST_BYTES)))
    }
}

impl Gate {
    /// Lets a request in, until what is returned is dropped.
    pub fn enter(&self, headers: &HeaderMap) -> Result<OwnedSemaphorePermit, Problem> {
        let told = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        // One that does not say how long it is may be as long as any.
        let bytes = told.unwrap_or(MAX_BODY_BYTES).min(MAX_BODY_BYTES);
        let places = bytes.div_ceil(LEAST_BYTES).max(1);
        let entered =
            u32::try_from(places).ok().and_then(|places| self.0.clone().try_acquire_many_owned(places).ok());
        entered.ok_or_else(|| {
            Problem::new(StatusCode::TOO_MANY_REQUESTS)
                .detail(
                    "too many pipelines are being made at once; nothing is recorded of this one. Try again",
                )
                .header(header::RETRY_AFTER, RETRY_SECONDS)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn of_length(bytes: usize) -> HeaderMap {
        HeaderMap::from_iter([(header::CONTENT_LENGTH, HeaderValue::from(bytes))])
    }

    #[test]
    fn it_is_full_by_bytes_and_has_room_again() {
        let gate = Gate::default();
        let large: Vec<_> = (0..16).map(|_| gate.enter(&of_length(MAX_BODY_BYTES)).unwrap()).collect();
        assert!(gate.enter(&of_length(1)).is_err(), "32 MiB are under way");
        drop(large);
        let small: Vec<_> = (0..512).map(|_| gate.enter(&of_length(1)).unwrap()).collect();
        assert!(gate.enter(&of_length(1)).is_err(), "512 are under way");
        drop(small);
        assert!(gate.enter(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn a_length_that_is_a_lie_costs_no_more_than_a_body_may() {
        assert!(Gate::default().enter(&of_length(usize::MAX)).is_ok());
    }
}
