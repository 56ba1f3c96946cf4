//! Reads pages of pipelines, newest first.

use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect};

use super::entity::pipelines;
use super::{Store, StoreError};

/// Which pipelines are wanted; none of the fields means all.
#[derive(Debug, Clone, Default)]
pub struct ListFilter {
    pub number: Option<i64>,
    /// A repository's identity.
    pub repository: Option<String>,
    /// Any of these full ref names.
    pub refs: Vec<String>,
    pub revision: Option<String>,
    pub name: Option<String>,
    pub state: Option<String>,
    pub outcome: Option<String>,
}

/// Some pipelines, and where the next page begins.
#[derive(Debug, Clone)]
pub struct Page {
    pub pipelines: Vec<pipelines::Model>,
    /// The number below which the next page begins; none on the last.
    pub next: Option<i64>,
}

impl Store {
    /// One page of at most `limit` pipelines whose number is below `below`.
    pub async fn list(
        &self,
        filter: &ListFilter,
        below: Option<i64>,
        limit: u64,
    ) -> Result<Page, StoreError> {
        use pipelines::Column;
        let mut query = pipelines::Entity::find().order_by_desc(Column::Number).limit(limit + 1);
        if let Some(below) = below {
            query = query.filter(Column::Number.lt(below));
        }
        if let Some(number) = filter.number {
            query = query.filter(Column::Number.eq(number));
        }
        for (column, wanted) in [
            (Column::Repository, &filter.repository),
            (Column::Revision, &filter.revision),
            (Column::Name, &filter.name),
            (Column::State, &filter.state),
            (Column::Outcome, &filter.outcome),
        ] {
            if let Some(wanted) = wanted {
                query = query.filter(column.eq(wanted.as_str()));
            }
        }
        if !filter.refs.is_empty() {
            query = query.filter(Column::Ref.is_in(filter.refs.iter().cloned()));
        }
        let mut pipelines = query.all(&self.readers).await?;
        let has_more = pipelines.len() as u64 > limit;
        pipelines.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
        let next = pipelines.last().filter(|_| has_more).map(|last| last.number);
        Ok(Page { pipelines, next })
    }
}
