//! Admits attempts by their tickets, and says what each may read and write.

use sealci_core::ids::{ActionId, AttemptId};
use sealci_core::plan::PlannedAction;
use sha2::{Digest, Sha256};

use super::Storage;
use crate::store::{AttemptRows, StoreError};

/// An attempt that has shown its ticket, and owned its action at that moment.
#[derive(Debug, Clone)]
pub struct Visitor {
    pub attempt: AttemptId,
    pub rows: AttemptRows,
    pub planned: PlannedAction,
}

/// Why a ticket does not admit.
#[derive(Debug, thiserror::Error)]
pub enum NotAdmitted {
    #[error("this needs the attempt's ticket, in `Authorization: Bearer <ticket>`")]
    NoTicket,
    #[error("the ticket is not this attempt's")]
    NotItsTicket,
    #[error("the attempt is over: nothing more is kept of it")]
    Over,
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Storage {
    /// Lets in whoever shows the attempt's ticket while the attempt owns its action.
    pub async fn admit(
        &self,
        attempt: AttemptId,
        authorization: Option<&str>,
    ) -> Result<Visitor, NotAdmitted> {
        let ticket = authorization.and_then(|text| text.split_once(' '));
        let ticket = ticket.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let ticket = ticket.ok_or(NotAdmitted::NoTicket)?.1.trim();
        let token = self.0.key.read(attempt, ticket).ok_or(NotAdmitted::NotItsTicket)?;
        let rows = self.0.store.attempt_rows(attempt).await?.ok_or(NotAdmitted::Over)?;
        let is_current = rows.attempt.number == rows.action.attempts
            && rows.attempt.token.unsigned_abs() == token.0
            && rows.attempt.state != "finished"
            && !rows.attempt.fenced;
        if !is_current {
            return Err(NotAdmitted::Over);
        }
        let planned = serde_json::from_str(&rows.action.planned).map_err(|error| {
            StoreError::from(crate::store::Malformed::new("actions", rows.action.id, error))
        })?;
        Ok(Visitor { attempt, rows, planned })
    }
}

impl Visitor {
    /// Which cache entries it writes: the base's, or a pull request's own.
    pub fn scope(&self) -> String {
        let pipeline = &self.rows.pipeline;
        if pipeline.event != "pull_request" {
            return String::new();
        }
        match &pipeline.r#ref {
            Some(name) => format!("pull_request:{name}"),
            // It shares them with nobody.
            None => format!("pull_request:{}", pipeline.id),
        }
    }

    /// Which cache entries it reads, its own first.
    pub fn readable_scopes(&self) -> Vec<String> {
        let own = self.scope();
        if own.is_empty() { vec![own] } else { vec![own, String::new()] }
    }

    /// Who brings a blob: the repository, within its trust scope.
    pub fn owner(&self) -> String {
        hex(&[&self.rows.pipeline.repository, &self.scope()])
    }

    /// What makes a cache entry the only one: the repository, the scope and the key.
    pub fn cache_identity(&self, scope: &str, key: &str) -> String {
        hex(&[&self.rows.pipeline.repository, scope, key])
    }

    /// Whether the plan says that it uses this action's artifacts, which is then one of the same pipeline.
    pub async fn uses(&self, storage: &Storage, action: ActionId) -> Result<bool, StoreError> {
        let Some(used) = storage.0.store.action(action).await? else { return Ok(false) };
        let ordinal = usize::try_from(used.ordinal).unwrap_or(usize::MAX);
        Ok(used.pipeline_id == self.rows.pipeline.id && self.planned.uses.contains(&ordinal))
    }
}

/// SHA-256 of some texts, told apart by their lengths, in hexadecimal.
fn hex(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}
