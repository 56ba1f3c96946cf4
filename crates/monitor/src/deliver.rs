//! Takes one configuration's events from the outbox to the controller, one after the other, each until it is answered
//! for.

use std::time::Duration;

use sealci_service::problem::chain;
use tokio::sync::Notify;

use crate::sink::{Delivered, OutboundEvent};
use crate::status::{DeliveryOutcome, LastDelivery, now};
use crate::store::{Pending, Stored};
use crate::watch::Watch;

/// Whoever asks to be left alone is, but not for ever.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(300);

/// Never ends by itself. Looks into the outbox at its start, and whenever `found` rings.
pub async fn repeatedly(watch: &Watch, stored: &Stored, found: &Notify) {
    let mut failures = 0_u32;
    loop {
        let wait = match watch.store.next_pending(stored.number).await {
            Ok(None) => {
                found.notified().await;
                continue;
            }
            Ok(Some(pending)) => deliver(watch, stored, &pending).await.err(),
            Err(error) => {
                tracing::error!(configuration.id = %stored.id, error = chain(&error), "cannot read the outbox");
                Some(None)
            }
        };
        match wait {
            None => failures = 0,
            Some(asked) => {
                failures = failures.saturating_add(1);
                let wait = watch.config.retry.after(failures);
                tokio::time::sleep(wait.max(asked.unwrap_or_default().min(LONGEST_RETRY_AFTER))).await;
            }
        }
    }
}

/// Delivers one event. The error is how long the other side asked to be left alone, if it did.
async fn deliver(watch: &Watch, stored: &Stored, pending: &Pending) -> Result<(), Option<Duration>> {
    let event = &pending.event;
    let delivery = match watch.sink.deliver(event).await {
        Ok(Delivered::Accepted { pipeline_id }) => {
            tracing::info!(configuration.id = %stored.id, pipeline.id = pipeline_id, revision = %event.event.revision, "delivered an event");
            LastDelivery { pipeline_id: Some(pipeline_id), ..delivery_of(event, DeliveryOutcome::Accepted) }
        }
        Ok(Delivered::Refused { reason }) => {
            tracing::warn!(configuration.id = %stored.id, reason, revision = %event.event.revision, "the controller refused an event");
            LastDelivery { error: Some(reason), ..delivery_of(event, DeliveryOutcome::Refused) }
        }
        Err(error) => {
            tracing::warn!(configuration.id = %stored.id, %error, "an event could not be delivered and will be again");
            let failing =
                LastDelivery { error: Some(error.reason), ..delivery_of(event, DeliveryOutcome::Failing) };
            watch.board.note_failing(stored.id, Some(failing));
            return Err(error.retry_after);
        }
    };
    if let Err(error) = watch.store.settle(stored.number, pending.sequence, &delivery).await {
        // It goes out once more, and the controller knows it again.
        tracing::error!(configuration.id = %stored.id, error = chain(&error), "cannot note a delivery");
        return Err(None);
    }
    watch.board.note_failing(stored.id, None);
    Ok(())
}

fn delivery_of(event: &OutboundEvent, outcome: DeliveryOutcome) -> LastDelivery {
    LastDelivery {
        at: now(),
        r#ref: event.event.r#ref.as_ref().map(ToString::to_string).unwrap_or_default(),
        revision: event.event.revision.to_string(),
        outcome,
        pipeline_id: None,
        error: None,
    }
}
