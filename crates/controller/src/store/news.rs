//! Tells the other replicas what a commit changed (NOTIFY), and hears what theirs did (LISTEN).
//!
//! It is a hint: it may be lost with a connection, so whoever waits for one also looks by itself now and then.

use std::fmt;
use std::str::FromStr;

use sea_orm::sqlx::postgres::PgListener;
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend, DbErr, Statement};
use sealci_core::ids::{AttemptId, PipelineId, ReplicaId};

use super::{Store, StoreError};

const CHANNEL: &str = "sealci";

/// PostgreSQL takes payloads below 8,000 bytes.
const MAX_PAYLOAD_BYTES: usize = 7_900;

/// What changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum News {
    /// A pipeline, its actions or attempts.
    Pipeline(PipelineId),
    /// A log grew or is whole.
    Log(AttemptId),
    /// A pipeline has another owner.
    Taken(PipelineId),
    /// The agents that there are.
    Agents,
}

impl fmt::Display for News {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pipeline(id) => write!(f, "pipeline {id}"),
            Self::Log(id) => write!(f, "log {id}"),
            Self::Taken(id) => write!(f, "taken {id}"),
            Self::Agents => f.write_str("agents"),
        }
    }
}

/// News of a kind that this version does not know, from a newer replica.
#[derive(Debug, PartialEq, Eq)]
pub struct UnknownNews;

impl FromStr for News {
    type Err = UnknownNews;

    fn from_str(text: &str) -> Result<Self, UnknownNews> {
        let (kind, id) = text.split_once(' ').unwrap_or((text, ""));
        match kind {
            "pipeline" => id.parse().map(Self::Pipeline).map_err(|_| UnknownNews),
            "log" => id.parse().map(Self::Log).map_err(|_| UnknownNews),
            "taken" => id.parse().map(Self::Taken).map_err(|_| UnknownNews),
            "agents" => Ok(Self::Agents),
            _ => Err(UnknownNews),
        }
    }
}

/// Payloads that say who tells it, then one thing a line.
fn payloads(teller: ReplicaId, news: impl IntoIterator<Item = News>) -> Vec<String> {
    let mut payloads: Vec<String> = Vec::new();
    for one in news {
        let line = format!("\n{one}");
        match payloads.last_mut().filter(|last| last.len() + line.len() <= MAX_PAYLOAD_BYTES) {
            Some(last) => last.push_str(&line),
            None => payloads.push(format!("{teller}{line}")),
        }
    }
    payloads
}

/// What a payload says, where it is not the reader's own.
fn read(payload: &str, reader: ReplicaId) -> Vec<News> {
    let mut lines = payload.lines();
    let is_own = lines.next().is_none_or(|teller| teller == reader.to_string());
    if is_own { Vec::new() } else { lines.filter_map(|line| line.parse().ok()).collect() }
}

/// Tells the others, once the transaction is committed. SQLite has no others.
pub(super) async fn tell(
    transaction: &DatabaseTransaction,
    teller: ReplicaId,
    news: impl IntoIterator<Item = News>,
) -> Result<(), DbErr> {
    if transaction.get_database_backend() != DbBackend::Postgres {
        return Ok(());
    }
    for payload in payloads(teller, news) {
        let statement = Statement::from_sql_and_values(
            DbBackend::Postgres,
            "SELECT pg_notify($1, $2)",
            [CHANNEL.into(), payload.into()],
        );
        transaction.execute_raw(statement).await?;
    }
    Ok(())
}

/// Hears what the other replicas tell.
pub struct NewsListener {
    listener: PgListener,
    reader: ReplicaId,
}

impl Store {
    /// Listens from now on. Only PostgreSQL has something to tell.
    pub async fn listen(&self, reader: ReplicaId) -> Result<NewsListener, StoreError> {
        let failed = |error| DbErr::Conn(sea_orm::RuntimeErr::SqlxError(std::sync::Arc::new(error)));
        let mut listener =
            PgListener::connect_with(self.writer.get_postgres_connection_pool()).await.map_err(failed)?;
        listener.listen(CHANNEL).await.map_err(failed)?;
        Ok(NewsListener { listener, reader })
    }
}

impl NewsListener {
    /// The next news; none where the connection was lost, and with it what was told meanwhile.
    pub async fn next(&mut self) -> Option<Vec<News>> {
        match self.listener.try_recv().await {
            Ok(Some(notification)) => Some(read(notification.payload(), self.reader)),
            Ok(None) | Err(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sealci_core::ids::ActionId;

    #[test]
    fn news_are_read_as_they_are_told_and_never_ones_own() {
        let (one, other) = (ReplicaId::from_parts(1, &[1; 10]), ReplicaId::from_parts(1, &[2; 10]));
        let pipeline = |n: u64| PipelineId::from_parts(n, &[3; 10]);
        let attempt = AttemptId { action: ActionId::from_parts(1, &[4; 10]), number: 7 };
        let mut news = vec![News::Agents, News::Log(attempt), News::Taken(pipeline(0))];
        news.extend((0..1000).map(|n| News::Pipeline(pipeline(n))));
        let payloads = payloads(one, news.clone());
        assert!(payloads.len() > 1 && payloads.iter().all(|payload| payload.len() <= MAX_PAYLOAD_BYTES));
        let heard: Vec<News> = payloads.iter().flat_map(|payload| read(payload, other)).collect();
        assert_eq!(heard, news);
        assert!(payloads.iter().all(|payload| read(payload, one).is_empty()));
        assert_eq!(read("x\nsomething new\nagents\npipeline 7", other), [News::Agents]);
    }
}
