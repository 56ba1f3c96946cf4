//! Plays the same random histories on every database and on a plain model in memory: all of them must tell the same, after
//! every commit, be it taken or refused.
//!
//! A seed is printed for each history; `SEALCI_SEED` plays that one alone, `SEALCI_HISTORIES` says how many are played.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::Path;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use sealci_controller::store::entity::{actions, attempts, commands, log_chunks, pipelines, rounds};
use sealci_controller::store::{Batch, ListFilter, LogPiece, Store};
use sealci_core::ids::{ActionId, AttemptId, PipelineId, ReplicaId};
use sealci_service::database::{Database, DatabaseUrl};
use sealci_service::testing;
use uuid::Uuid;

/// So many commits make a history.
const COMMITS: usize = 30;

/// The database as a reader of its contract would write it: rows by their keys.
#[derive(Debug, Clone, Default)]
struct Model {
    pipelines: BTreeMap<Uuid, pipelines::Model>,
    actions: BTreeMap<Uuid, actions::Model>,
    attempts: BTreeMap<(Uuid, i32), attempts::Model>,
    commands: BTreeMap<(Uuid, i32, i32), commands::Model>,
    log_chunks: BTreeMap<(Uuid, i32, i64), (log_chunks::Model, Vec<u8>)>,
    rounds: BTreeMap<(Uuid, String), rounds::Model>,
    last_number: i64,
    last_token: i64,
}

/// What one commit writes, before it is known whether it may.
#[derive(Debug, Clone, Default)]
struct Changes {
    pipelines: Vec<pipelines::Model>,
    actions: Vec<actions::Model>,
    attempts: Vec<attempts::Model>,
    commands: Vec<commands::Model>,
    log_chunks: Vec<(log_chunks::Model, Vec<u8>)>,
    rounds: Vec<rounds::Model>,
}

impl Changes {
    fn batch(&self) -> Batch {
        let mut batch = Batch::default();
        batch.pipelines.extend(self.pipelines.iter().map(|row| (row.id, row.clone())));
        batch.actions.extend(self.actions.iter().map(|row| (row.id, row.clone())));
        batch.attempts.extend(self.attempts.iter().map(|row| ((row.action_id, row.number), row.clone())));
        let key = |row: &commands::Model| (row.action_id, row.number, row.index);
        batch.commands.extend(self.commands.iter().map(|row| (key(row), row.clone())));
        batch.log_chunks.extend(self.log_chunks.iter().map(|(row, _)| row.clone()));
        batch.rounds.extend(self.rounds.iter().cloned());
        batch
    }
}

impl Model {
    /// Takes a commit, all of it or nothing. Refused is what names a key or a unique value twice.
    fn commit(&mut self, changes: &Changes) -> Result<(), ()> {
        let mut after = self.clone();
        // As a batch has them: by their keys.
        let by_key: BTreeMap<Uuid, pipelines::Model> =
            changes.pipelines.iter().map(|row| (row.id, row.clone())).collect();
        for (id, mut row) in by_key {
            if row.number == 0 {
                after.last_number += 1;
                row.number = after.last_number;
            }
            let clashes = |other: &pipelines::Model| {
                other.id != id && (other.identity == row.identity || other.number == row.number)
            };
            if after.pipelines.values().any(clashes) {
                return Err(());
            }
            after.pipelines.insert(id, row);
        }
        after.actions.extend(changes.actions.iter().map(|row| (row.id, row.clone())));
        for row in &changes.attempts {
            let key = (row.action_id, row.number);
            if after.attempts.iter().any(|(other, attempt)| *other != key && attempt.token == row.token) {
                return Err(());
            }
            after.attempts.insert(key, row.clone());
        }
        let key = |row: &commands::Model| (row.action_id, row.number, row.index);
        after.commands.extend(changes.commands.iter().map(|row| (key(row), row.clone())));
        for (row, bytes) in &changes.log_chunks {
            let key = (row.action_id, row.number, row.start);
            if after.log_chunks.insert(key, (row.clone(), bytes.clone())).is_some() {
                return Err(());
            }
        }
        for row in &changes.rounds {
            let key = (row.pipeline_id, row.request_id.clone());
            if after.rounds.insert(key, row.clone()).is_some() {
                return Err(());
            }
        }
        *self = after;
        Ok(())
    }

    fn actions_of(&self, pipeline: Uuid) -> Vec<actions::Model> {
        let mut actions: Vec<_> =
            self.actions.values().filter(|row| row.pipeline_id == pipeline).cloned().collect();
        actions.sort_by_key(|row| row.ordinal);
        actions
    }

    fn is_of(&self, action: Uuid, pipeline: Uuid) -> bool {
        self.actions.get(&action).is_some_and(|row| row.pipeline_id == pipeline)
    }
}

/// Draws what happens next.
struct Chance {
    random: StdRng,
    ids: u64,
}

impl Chance {
    fn id(&mut self) -> Uuid {
        self.ids += 1;
        let mut random = [0; 10];
        random[..8].copy_from_slice(&self.random.random::<u64>().to_be_bytes());
        ActionId::from_parts(self.ids, &random).as_uuid()
    }

    /// Figures as they come, and those at the ends.
    fn figure(&mut self) -> i64 {
        *[0, 1, i64::MAX, i64::MIN, self.random.random_range(2..1 << 40)].choose(&mut self.random).unwrap()
    }

    fn text(&mut self) -> String {
        let texts =
            ["", "a", "ä\u{202e}é", "'; DROP TABLE pipelines; --", "\\x00 %_ \"\n\t", "refs/heads/main"];
        (*texts.choose(&mut self.random).unwrap()).to_owned()
    }

    fn maybe<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.random.random_bool(0.5).then(|| make(self))
    }

    fn one_of<T: Clone>(&mut self, all: impl Iterator<Item = T>) -> Option<T> {
        all.collect::<Vec<_>>().choose(&mut self.random).cloned()
    }

    fn changes(&mut self, model: &Model) -> Changes {
        let mut changes = Changes::default();
        for _ in 0..self.random.random_range(1..6) {
            match self.random.random_range(0..8) {
                0 => self.new_pipeline(model, &mut changes),
                1 => self.moved_pipeline(model, &mut changes),
                2 => self.moved_action(model, &mut changes),
                3 | 4 => self.attempt(model, &mut changes),
                5 => self.command(model, &mut changes),
                6 => self.log_chunk(model, &mut changes),
                _ => self.round(model, &mut changes),
            }
        }
        changes
    }

    fn new_pipeline(&mut self, model: &Model, changes: &mut Changes) {
        let id = self.id();
        let known = self.one_of(model.pipelines.values().map(|row| row.identity.clone()));
        let twice = known.filter(|_| self.random.random_bool(0.1));
        changes.pipelines.push(pipelines::Model {
            id,
            number: 0,
            identity: twice.unwrap_or_else(|| id.to_string()),
            name: self.text(),
            repository: self.text(),
            repository_url: self.text(),
            event: "push".into(),
            r#ref: self.maybe(Self::text),
            revision: self.text(),
            manifest_path: self.maybe(Self::text),
            manifest: self.text().repeat(100),
            round: 1,
            cancel_wished: false,
            state: "queued".into(),
            outcome: None,
            owner: Uuid::nil(),
            epoch: 1,
            created_at: self.figure(),
            finished_at: None,
        });
        for ordinal in 0..self.random.random_range(1..4) {
            let action = self.id();
            changes.actions.push(actions::Model {
                id: action,
                pipeline_id: id,
                ordinal,
                name: self.text(),
                planned: "{}".into(),
                state: "queued".into(),
                outcome: None,
                attempts: 0,
                attempts_in_round: 0,
                retries_in_round: 0,
                queued_at: self.maybe(Self::figure),
                started_at: None,
                finished_at: None,
            });
        }
    }

    fn moved_pipeline(&mut self, model: &Model, changes: &mut Changes) {
        let Some(mut row) = self.one_of(model.pipelines.values().cloned()) else { return };
        row.cancel_wished = self.random.random();
        row.round += 1;
        row.epoch += 1;
        row.finished_at = self.maybe(Self::figure);
        row.state = if row.finished_at.is_some() { "finished".into() } else { "running".into() };
        row.outcome = self.maybe(|_| "failed".into());
        changes.pipelines.push(row);
    }

    fn moved_action(&mut self, model: &Model, changes: &mut Changes) {
        let Some(mut row) = self.one_of(model.actions.values().cloned()) else { return };
        row.state = "active".into();
        row.outcome = self.maybe(Self::text);
        row.attempts_in_round += 1;
        row.started_at = self.maybe(Self::figure);
        changes.actions.push(row);
    }

    /// The next attempt of an action, or another state of one that is there.
    fn attempt(&mut self, model: &Model, changes: &mut Changes) {
        if let Some(mut row) = self.one_of(model.attempts.values().cloned()).filter(|_| self.random.random())
        {
            row.state = "finished".into();
            row.outcome = self.maybe(Self::text);
            row.fenced = self.random.random();
            row.next_sequence = self.figure();
            row.finished_at = self.maybe(Self::figure);
            changes.attempts.retain(|other| (other.action_id, other.number) != (row.action_id, row.number));
            changes.attempts.push(row);
            return;
        }
        let Some(mut action) = self.one_of(model.actions.values().cloned()) else { return };
        if changes.actions.iter().any(|other| other.id == action.id) {
            return;
        }
        action.attempts += 1;
        let taken = self.one_of(model.attempts.values().map(|row| row.token));
        let token = taken.filter(|_| self.random.random_bool(0.05)).unwrap_or(self.ids.cast_signed() << 20);
        self.ids += 1;
        changes.attempts.push(attempts::Model {
            action_id: action.id,
            number: action.attempts,
            round: 1,
            token,
            agent_id: self.id(),
            instance_id: self.id(),
            claim_id: self.id(),
            state: "claimed".into(),
            outcome: None,
            fenced: false,
            next_sequence: 0,
            log_end: 0,
            log_length: None,
            executor: self.maybe(Self::text),
            claimed_at: self.figure(),
            started_at: None,
            finished_at: None,
        });
        changes.actions.push(action);
    }

    fn command(&mut self, model: &Model, changes: &mut Changes) {
        let Some((action_id, number)) = self.one_of(model.attempts.keys().copied()) else { return };
        let index = self.random.random_range(0..3);
        changes.commands.retain(|row| (row.action_id, row.number, row.index) != (action_id, number, index));
        changes.commands.push(commands::Model {
            action_id,
            number,
            index,
            log_offset: self.figure(),
            log_end: self.maybe(Self::figure),
            exit_code: self.maybe(|chance| chance.random.random()),
            duration_us: self.maybe(Self::figure),
            cpu_user_us: self.maybe(Self::figure),
            cpu_system_us: self.maybe(Self::figure),
            memory_peak_bytes: self.maybe(Self::figure),
            read_bytes: self.maybe(Self::figure),
            write_bytes: self.maybe(Self::figure),
        });
    }

    /// What continues an attempt's log; now and then it is told twice.
    fn log_chunk(&mut self, model: &Model, changes: &mut Changes) {
        let Some((action_id, number)) = self.one_of(model.attempts.keys().copied()) else { return };
        let of_attempt = model.log_chunks.range((action_id, number, 0)..=(action_id, number, i64::MAX));
        let end = of_attempt.last().map_or(0, |(_, (row, _))| row.end);
        let is_there =
            changes.log_chunks.iter().any(|(row, _)| (row.action_id, row.number) == (action_id, number));
        if is_there {
            return;
        }
        let start = if end > 0 && self.random.random_bool(0.05) { 0 } else { end };
        let length = self.random.random_range(1..5000);
        let bytes: Vec<u8> = (0..length).map(|_| self.random.random_range(b'a'..b'e')).collect();
        let gap = self.random.random_bool(0.2).then(|| self.text());
        let data = gap.is_none().then(|| zstd::bulk::compress(&bytes, 1).unwrap());
        let end = start + i64::from(length);
        changes.log_chunks.push((log_chunks::Model { action_id, number, start, end, data, gap }, bytes));
    }

    fn round(&mut self, model: &Model, changes: &mut Changes) {
        let Some(pipeline_id) = self.one_of(model.pipelines.keys().copied()) else { return };
        let request_id = self.random.random_range(0..20).to_string();
        if changes.rounds.iter().all(|row| (row.pipeline_id, &row.request_id) != (pipeline_id, &request_id)) {
            changes.rounds.push(rounds::Model {
                pipeline_id,
                request_id,
                round: 2,
                created_at: self.figure(),
            });
        }
    }
}

/// Asks a store everything that the model knows.
async fn compare(store: &Store, model: &Model, chance: &mut Chance) {
    let mut unfinished: Vec<_> = model.pipelines.values().filter(|row| row.state != "finished").collect();
    unfinished.sort_by_key(|row| row.number);
    let unfinished: Vec<_> = unfinished.iter().map(|row| PipelineId::from_uuid(row.id)).collect();
    assert_eq!(store.unfinished(ReplicaId::from_uuid(Uuid::nil())).await.unwrap(), unfinished);
    if let Some(row) = chance.one_of(model.pipelines.values().cloned()) {
        compare_pipeline(store, model, &row).await;
    }
    if let Some(key) = chance.one_of(model.attempts.keys().copied()) {
        compare_attempt(store, model, key, chance).await;
    }
    if let Some(round) = chance.one_of(model.rounds.values().cloned()) {
        let id = PipelineId::from_uuid(round.pipeline_id);
        assert_eq!(store.round_of_request(id, &round.request_id).await.unwrap(), Some(round.round));
        assert_eq!(store.round_of_request(id, "never asked").await.unwrap(), None);
    }
    let state = Some("finished".to_owned());
    let page = store.list(&ListFilter { state, ..ListFilter::default() }, None, 3).await.unwrap();
    let mut finished: Vec<_> = model.pipelines.values().filter(|row| row.state == "finished").collect();
    finished.sort_by_key(|row| std::cmp::Reverse(row.number));
    assert_eq!(page.next.is_some(), finished.len() > 3);
    finished.truncate(3);
    assert_eq!(page.pipelines.iter().collect::<Vec<_>>(), finished);
}

async fn compare_pipeline(store: &Store, model: &Model, row: &pipelines::Model) {
    let id = PipelineId::from_uuid(row.id);
    let actions = model.actions_of(row.id);
    let attempts: Vec<_> =
        model.attempts.values().filter(|attempt| model.is_of(attempt.action_id, row.id)).collect();
    let commands: Vec<_> =
        model.commands.values().filter(|command| model.is_of(command.action_id, row.id)).collect();

    let story = store.story(id).await.unwrap().unwrap();
    assert_eq!((&story.pipeline, &story.actions), (row, &actions));
    assert_eq!(story.attempts.iter().collect::<Vec<_>>(), attempts);
    assert_eq!(story.commands.iter().collect::<Vec<_>>(), commands);

    let rows = store.pipeline(id).await.unwrap().unwrap();
    assert_eq!((&rows.pipeline, &rows.actions), (row, &actions));
    let is_current = |attempt: &attempts::Model| {
        actions.iter().any(|action| (action.id, action.attempts) == (attempt.action_id, attempt.number))
    };
    let current: Vec<_> = attempts.into_iter().filter(|attempt| is_current(attempt)).collect();
    assert_eq!(rows.attempts.iter().collect::<Vec<_>>(), current);
    assert_eq!(rows.commands.len(), commands.iter().filter(|command| command.exit_code.is_none()).count());

    assert_eq!(store.pipeline_with_identity(&row.identity).await.unwrap(), Some(id));
    for action in actions {
        assert_eq!(store.pipeline_of_action(ActionId::from_uuid(action.id)).await.unwrap(), Some(id));
    }
}

async fn compare_attempt(store: &Store, model: &Model, key: (Uuid, i32), chance: &mut Chance) {
    let id = AttemptId { action: ActionId::from_uuid(key.0), number: key.1.unsigned_abs() };
    assert_eq!(store.attempt(id).await.unwrap().as_ref(), model.attempts.get(&key));
    let chunks: Vec<_> = model.log_chunks.range((key.0, key.1, 0)..=(key.0, key.1, i64::MAX)).collect();
    let end = chunks.last().map_or(0, |(_, (row, _))| row.end.unsigned_abs());
    let at = chance.random.random_range(0..=end);
    let found = chunks
        .iter()
        .map(|(_, chunk)| chunk)
        .find(|(row, _)| (row.start.unsigned_abs()..row.end.unsigned_abs()).contains(&at));
    let expected = found.map(|(row, bytes)| match &row.gap {
        Some(reason) => LogPiece::Gap { from: at, to: row.end.unsigned_abs(), reason: reason.clone() },
        None => {
            let skip = usize::try_from(at - row.start.unsigned_abs()).unwrap();
            LogPiece::Bytes { offset: at, bytes: bytes[skip..].to_vec().into() }
        }
    });
    assert_eq!(store.log_chunk(id, at).await.unwrap(), expected);
    let gap =
        chunks.iter().map(|(_, (row, _))| row).find(|row| row.gap.is_some() && row.end.unsigned_abs() > at);
    let gap = gap.map(|row| (row.start.unsigned_abs(), row.end.unsigned_abs(), row.gap.clone().unwrap()));
    assert_eq!(store.next_gap(id, at).await.unwrap(), gap);
}

/// One history, on all stores.
async fn play(seed: u64, stores: &[Store], model: &mut Model) -> (usize, usize) {
    let mut chance = Chance { random: StdRng::seed_from_u64(seed), ids: seed };
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..COMMITS {
        let changes = chance.changes(model);
        let expected = model.commit(&changes);
        if expected.is_ok() {
            taken += 1
        } else {
            refused += 1
        }
        let tokens = chance.random.random_range(1..50);
        let first = model.last_token + 1;
        model.last_token += tokens;
        for store in stores {
            let mut batch = changes.batch();
            assert_eq!(store.commit(&mut batch).await.map_err(drop), expected, "{changes:#?}");
            if expected.is_ok() {
                for (id, row) in &batch.pipelines {
                    assert_eq!(row.number, model.pipelines[id].number, "a commit gives numbers");
                }
            }
            assert_eq!(store.take_numbers("token", tokens).await.unwrap(), first);
            // All stores are asked the same.
            let mut chance = Chance { random: chance.random.clone(), ids: 0 };
            compare(store, model, &mut chance).await;
        }
    }
    (taken, refused)
}

async fn stores(folder: &Path) -> Vec<Store> {
    let mut urls = vec![DatabaseUrl::Sqlite(folder.join("histories.sqlite"))];
    urls.extend(testing::postgres("the store's histories").await);
    let mut stores = Vec::new();
    for url in urls {
        let database = Database::open(&url).await.unwrap();
        stores.push(Store::open(database.writer, database.readers).await.unwrap());
    }
    stores
}

#[tokio::test]
async fn every_database_tells_what_a_plain_model_tells() {
    let seeds: Vec<u64> = match std::env::var("SEALCI_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => {
            let histories = std::env::var("SEALCI_HISTORIES").map_or(6, |text| text.parse().unwrap());
            (0..histories).map(|_| rand::random::<u64>() >> 24).collect()
        }
    };
    for seed in seeds {
        println!("SEALCI_SEED={seed}");
        let folder = tempfile::tempdir().unwrap();
        let (taken, refused) = play(seed, &stores(folder.path()).await, &mut Model::default()).await;
        println!("{taken} commits taken, {refused} refused");
    }
}
