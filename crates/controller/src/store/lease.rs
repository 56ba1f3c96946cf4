//! Keeps who owns what: each unfinished pipeline has one owner, a replica of the controller that holds a lease.
//!
//! A lease is one row with a counter, for all that its replica owns. The replica raises the counter while it owns something
//! unfinished; whoever reads it unchanged for long enough, by its own monotonic time, deletes the row and takes the pipelines
//! over, each at the next epoch. One pipeline alone is taken over from a replica that lives, too, where somebody wishes something
//! of it elsewhere.
//!
//! Invariants:
//! - a commit of a replica whose row is gone, or of a pipeline that it does not own at the epoch it thinks, writes nothing; the
//!   rows are locked up to its end, so that nothing is taken over in the middle of one;
//! - an id that lost its row never has one again.

use std::collections::{BTreeMap, HashMap};

use sea_orm::sea_query::{Expr, LockType};
use sea_orm::{
    ColumnTrait, DatabaseTransaction, DbErr, EntityTrait, ExprTrait, QueryFilter, QueryOrder, QuerySelect,
    Set, TransactionTrait,
};
use sealci_core::ids::{PipelineId, ReplicaId};
use uuid::Uuid;

use super::entity::{leases, pipelines};
use super::news::{self, News};
use super::{Store, StoreError};

/// Under whose lease a batch is committed, and at which epochs that one owns the pipelines it changes.
#[derive(Debug, Clone)]
pub struct Held {
    pub replica: ReplicaId,
    pub epochs: BTreeMap<Uuid, i64>,
    /// Whether other replicas are to hear of the commit.
    pub has_others: bool,
}

/// Whose a pipeline is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ownership {
    pub owner: ReplicaId,
    pub is_finished: bool,
}

impl Held {
    /// Locks what is held up to the transaction's end, or says that it is not.
    pub(super) async fn lock(&self, transaction: &DatabaseTransaction) -> Result<(), StoreError> {
        lock_lease(transaction, self.replica).await?;
        if self.epochs.is_empty() {
            return Ok(());
        }
        let owned: Vec<(Uuid, i64)> = pipelines::Entity::find()
            .select_only()
            .columns([pipelines::Column::Id, pipelines::Column::Epoch])
            .filter(pipelines::Column::Id.is_in(self.epochs.keys().copied()))
            .filter(pipelines::Column::Owner.eq(self.replica.as_uuid()))
            // In one order, so that no two wait for each other.
            .order_by_asc(pipelines::Column::Id)
            .lock(LockType::NoKeyUpdate)
            .into_tuple()
            .all(transaction)
            .await?;
        if owned.into_iter().collect::<BTreeMap<_, _>>() == self.epochs {
            Ok(())
        } else {
            Err(StoreError::TakenOver)
        }
    }
}

async fn lock_lease(transaction: &DatabaseTransaction, replica: ReplicaId) -> Result<(), StoreError> {
    let lease = leases::Entity::find_by_id(replica.as_uuid()).lock(LockType::Share).one(transaction).await?;
    lease.map(drop).ok_or(StoreError::LeaseLost)
}

impl Store {
    /// Begins the lease of a replica that never had one.
    pub async fn begin_lease(&self, replica: ReplicaId) -> Result<(), StoreError> {
        let row = leases::ActiveModel { owner: Set(replica.as_uuid()), counter: Set(0) };
        self.write(leases::Entity::insert(row).exec_without_returning(&self.writer)).await?;
        Ok(())
    }

    /// Raises the lease's counter. False: it is lost.
    pub async fn renew_lease(&self, replica: ReplicaId) -> Result<bool, StoreError> {
        let renewing = leases::Entity::update_many()
            .col_expr(leases::Column::Counter, Expr::col(leases::Column::Counter).add(1))
            .filter(leases::Column::Owner.eq(replica.as_uuid()));
        Ok(self.write(renewing.exec(&self.writer)).await?.rows_affected > 0)
    }

    /// Gives a lease back: what its replica owns is everybody's.
    pub async fn end_lease(&self, replica: ReplicaId) -> Result<(), StoreError> {
        self.write(leases::Entity::delete_by_id(replica.as_uuid()).exec(&self.writer)).await?;
        Ok(())
    }

    /// All leases with their counters.
    pub async fn leases(&self) -> Result<HashMap<ReplicaId, i64>, StoreError> {
        let rows = leases::Entity::find().all(&self.writer).await?;
        Ok(rows.into_iter().map(|row| (ReplicaId::from_uuid(row.owner), row.counter)).collect())
    }

    /// Who owns unfinished pipelines.
    pub async fn owners(&self) -> Result<Vec<ReplicaId>, StoreError> {
        let owners: Vec<Uuid> = pipelines::Entity::find()
            .select_only()
            .column(pipelines::Column::Owner)
            .filter(pipelines::Column::State.ne("finished"))
            .distinct()
            .into_tuple()
            .all(&self.writer)
            .await?;
        Ok(owners.into_iter().map(ReplicaId::from_uuid).collect())
    }

    /// Whose a pipeline is; none if there is no such pipeline.
    pub async fn ownership(&self, id: PipelineId) -> Result<Option<Ownership>, StoreError> {
        let row: Option<(Uuid, String)> = pipelines::Entity::find_by_id(id.as_uuid())
            .select_only()
            .columns([pipelines::Column::Owner, pipelines::Column::State])
            .into_tuple()
            .one(&self.writer)
            .await?;
        Ok(row.map(|(owner, state)| Ownership {
            owner: ReplicaId::from_uuid(owner),
            is_finished: state == "finished",
        }))
    }

    /// The unfinished pipelines, everybody's, with their epochs.
    pub async fn epochs(&self) -> Result<BTreeMap<PipelineId, u64>, StoreError> {
        let rows: Vec<(Uuid, i64)> = pipelines::Entity::find()
            .select_only()
            .columns([pipelines::Column::Id, pipelines::Column::Epoch])
            .filter(pipelines::Column::State.ne("finished"))
            .into_tuple()
            .all(&self.writer)
            .await?;
        let read = |(id, epoch): (Uuid, i64)| (PipelineId::from_uuid(id), epoch.unsigned_abs());
        Ok(rows.into_iter().map(read).collect())
    }

    /// The ids of all unfinished pipelines of an owner, in order.
    pub async fn unfinished(&self, owner: ReplicaId) -> Result<Vec<PipelineId>, StoreError> {
        let ids: Vec<Uuid> = pipelines::Entity::find()
            .select_only()
            .column(pipelines::Column::Id)
            .filter(pipelines::Column::Owner.eq(owner.as_uuid()))
            .filter(pipelines::Column::State.ne("finished"))
            .order_by_asc(pipelines::Column::Number)
            .into_tuple()
            .all(&self.writer)
            .await?;
        Ok(ids.into_iter().map(PipelineId::from_uuid).collect())
    }

    /// Takes everything unfinished over, whoever owned it: for who has the database alone.
    pub async fn take_over_all(&self, replica: ReplicaId) -> Result<(), StoreError> {
        let transaction = self.writer.begin().await?;
        change_owner(&transaction, replica, pipelines::Column::Owner.ne(replica.as_uuid())).await?;
        self.write(transaction.commit()).await?;
        Ok(())
    }

    /// Takes over everything unfinished of another replica, and its lease with it, unless that has moved on from `counter`
    /// (none: there is no lease). Whether it did.
    pub async fn take_over_from(
        &self,
        former: ReplicaId,
        counter: Option<i64>,
        replica: ReplicaId,
    ) -> Result<bool, StoreError> {
        let transaction = self.writer.begin().await?;
        lock_lease(&transaction, replica).await?;
        let lease =
            leases::Entity::find_by_id(former.as_uuid()).lock(LockType::Update).one(&transaction).await?;
        if lease.map(|lease| lease.counter) != counter {
            transaction.rollback().await?;
            return Ok(false);
        }
        leases::Entity::delete_by_id(former.as_uuid()).exec(&transaction).await?;
        change_owner(&transaction, replica, pipelines::Column::Owner.eq(former.as_uuid())).await?;
        self.write(transaction.commit()).await?;
        Ok(true)
    }

    /// Takes one pipeline over, whoever owns it, finished or not. False: there is none.
    pub async fn take_over(&self, id: PipelineId, replica: ReplicaId) -> Result<bool, StoreError> {
        let transaction = self.writer.begin().await?;
        lock_lease(&transaction, replica).await?;
        let taken = pipelines::Entity::update_many()
            .col_expr(pipelines::Column::Owner, Expr::value(replica.as_uuid()))
            .col_expr(pipelines::Column::Epoch, Expr::col(pipelines::Column::Epoch).add(1))
            .filter(pipelines::Column::Id.eq(id.as_uuid()))
            .exec(&transaction)
            .await?;
        news::tell(&transaction, replica, [News::Taken(id)]).await?;
        self.write(transaction.commit()).await?;
        Ok(taken.rows_affected > 0)
    }
}

async fn change_owner(
    transaction: &DatabaseTransaction,
    replica: ReplicaId,
    whose: impl sea_orm::sea_query::IntoCondition,
) -> Result<(), DbErr> {
    pipelines::Entity::update_many()
        .col_expr(pipelines::Column::Owner, Expr::value(replica.as_uuid()))
        .col_expr(pipelines::Column::Epoch, Expr::col(pipelines::Column::Epoch).add(1))
        .filter(whose)
        .filter(pipelines::Column::State.ne("finished"))
        .exec(transaction)
        .await
        .map(drop)
}
