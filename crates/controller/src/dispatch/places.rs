//! Finds pipelines: in memory, in the database, or with another replica, and takes over what is to be this one's.

use sealci_core::ids::{ActionId, AttemptId, PipelineId};

use super::driver::Driver;
use super::live::Live;
use crate::store::{Held, StoreError};

/// Where the driver finds a pipeline.
#[derive(Debug)]
pub(super) enum Place<'a> {
    Nowhere,
    /// Another replica's: that one takes what is reported of it.
    Elsewhere,
    Here(&'a mut Live),
}

/// Whether looking for a pipeline may make it this replica's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Take {
    /// What is to be recorded of it comes here: it is taken over if its owner is done with it, or does not come by what is sent
    /// here instead.
    IfDue,
    /// Every replica hears this: its owner does, too.
    Never,
}

impl<'a> Place<'a> {
    /// The pipeline, if it is this replica's.
    pub fn here(self) -> Option<&'a mut Live> {
        match self {
            Self::Here(live) => Some(live),
            Self::Nowhere | Self::Elsewhere => None,
        }
    }
}

impl Driver {
    /// Finds a pipeline, for what is reported of it: in memory, or in the database if it is this replica's or nobody's.
    pub(super) async fn place(&mut self, id: PipelineId, take: Take) -> Result<Place<'_>, StoreError> {
        if !self.live.contains_key(&id) {
            if self.store.is_shared() {
                let Some(ownership) = self.store.ownership(id).await? else { return Ok(Place::Nowhere) };
                if ownership.owner != self.replica.id() {
                    if take == Take::Never || !self.may_take_over(id, ownership, self.now) {
                        return Ok(Place::Elsewhere);
                    }
                    self.store.take_over(id, self.replica.id()).await?;
                    // The scheduler is to hear all of it from here now.
                    self.forgotten.insert(id);
                }
            }
            return self.load(id).await;
        }
        Ok(self.live.get_mut(&id).map_or(Place::Nowhere, Place::Here))
    }

    /// Finds a pipeline, for what a person wishes of it: taken over from whoever owns it.
    pub(super) async fn own(&mut self, id: PipelineId) -> Result<Option<&mut Live>, StoreError> {
        if !self.live.contains_key(&id) {
            if self.store.is_shared() {
                self.store.take_over(id, self.replica.id()).await?;
                // The schedulers are to hear all of it from here now, also where nothing comes of the wish.
                self.forgotten.insert(id);
            }
            return Ok(self.load(id).await?.here());
        }
        Ok(self.live.get_mut(&id))
    }

    async fn load(&mut self, id: PipelineId) -> Result<Place<'_>, StoreError> {
        let rows = match self.store.pipeline(id).await {
            Ok(Some(rows)) => rows,
            Ok(None) => return Ok(Place::Nowhere),
            Err(error) => {
                // It may be this replica's now: then nobody else takes it up.
                self.forgotten.insert(id);
                return Err(error);
            }
        };
        if self.store.is_shared() && rows.pipeline.owner != self.replica.id().as_uuid() {
            return Ok(Place::Elsewhere);
        }
        self.elsewhere.remove(&id);
        self.adopt(Live::of_rows(rows, self.now)?);
        Ok(self.live.get_mut(&id).map_or(Place::Nowhere, Place::Here))
    }

    pub(super) async fn place_of_action(
        &mut self,
        action: ActionId,
        take: Take,
    ) -> Result<Place<'_>, StoreError> {
        let id = match self.by_action.get(&action) {
            Some(id) => *id,
            None => match self.store.pipeline_of_action(action).await? {
                Some(id) => id,
                None => return Ok(Place::Nowhere),
            },
        };
        self.place(id, take).await
    }

    /// The place of the pipeline with this attempt in memory, also if it is an older one; nowhere if it never was claimed.
    pub(super) async fn place_of_attempt(
        &mut self,
        id: AttemptId,
        take: Take,
    ) -> Result<Place<'_>, StoreError> {
        let pipeline = match self.place_of_action(id.action, take).await? {
            Place::Here(live) if live.attempt(id).is_some() => live.id(),
            Place::Here(live) => {
                let pipeline = live.id();
                let Some(row) = self.store.attempt(id).await? else { return Ok(Place::Nowhere) };
                if let Some(live) = self.live.get_mut(&pipeline) {
                    live.remember_stale(row)?;
                }
                pipeline
            }
            Place::Nowhere => return Ok(Place::Nowhere),
            Place::Elsewhere => return Ok(Place::Elsewhere),
        };
        Ok(self.live.get_mut(&pipeline).map_or(Place::Nowhere, Place::Here))
    }

    /// What must be held in the database for these pipelines to be written; none where nobody else has it open.
    pub(super) fn held(&self, dirty: impl Iterator<Item = PipelineId>) -> Option<Held> {
        let epoch = |live: &Live| (live.pipeline.id, live.pipeline.epoch);
        self.store.is_shared().then(|| Held {
            replica: self.replica.id(),
            epochs: dirty
                .filter_map(|id| self.live.get(&id))
                .filter(|live| live.is_recorded())
                .map(epoch)
                .collect(),
            has_others: self.leases.has_others(),
        })
    }

    pub(super) fn adopt(&mut self, live: Live) {
        let id = live.id();
        let now = self.now;
        live.active_attempts().for_each(|(attempt, _)| self.presence.heard_or_begin(attempt, now));
        self.by_action.extend(live.state.actions.iter().map(|action| (action.id, id)));
        self.live.insert(id, live);
    }

    /// Forgets a pipeline. Should it come back, silence counts from then: until then nobody may have listened here.
    pub(super) fn drop_live(&mut self, id: PipelineId) {
        if let Some(live) = self.live.remove(&id) {
            live.active_attempts().for_each(|(attempt, _)| self.presence.forget(attempt));
            for action in &live.state.actions {
                self.by_action.remove(&action.id);
            }
        }
    }
}
