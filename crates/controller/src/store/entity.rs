//! Maps the tables. Times are milliseconds since 1970, for showing only; order comes from `pipelines.number`.

pub mod storage;

/// One run of a manifest for one event.
pub mod pipelines {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "pipelines")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        /// From the counter `pipeline`.
        #[sea_orm(unique)]
        pub number: i64,
        /// I4: what makes two creates the same. Unique.
        #[sea_orm(unique)]
        pub identity: String,
        pub name: String,
        pub repository: String,
        pub repository_url: String,
        pub event: String,
        pub r#ref: Option<String>,
        pub revision: String,
        pub manifest_path: Option<String>,
        #[sea_orm(column_type = "Text")]
        pub manifest: String,
        pub round: i32,
        pub cancel_wished: bool,
        pub state: String,
        pub outcome: Option<String>,
        /// The replica that owns it.
        pub owner: Uuid,
        /// Rises with every new owner.
        pub epoch: i64,
        pub created_at: i64,
        pub finished_at: Option<i64>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The units that are scheduled.
pub mod actions {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "actions")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        pub pipeline_id: Uuid,
        /// Its place in the manifest, from 0.
        pub ordinal: i32,
        pub name: String,
        /// The planned action, as JSON.
        #[sea_orm(column_type = "Text")]
        pub planned: String,
        pub state: String,
        /// The outcome, as JSON.
        #[sea_orm(column_type = "Text", nullable)]
        pub outcome: Option<String>,
        pub attempts: i32,
        pub attempts_in_round: i32,
        /// Those of them that the manifest's `retry` gave.
        pub retries_in_round: i32,
        pub queued_at: Option<i64>,
        pub started_at: Option<i64>,
        pub finished_at: Option<i64>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The executions. A row is made by a granted claim, and never goes away.
pub mod attempts {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "attempts")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub action_id: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub number: i32,
        pub round: i32,
        /// The fencing token, from the counter `token`. Unique.
        #[sea_orm(unique)]
        pub token: i64,
        pub agent_id: Uuid,
        pub instance_id: Uuid,
        pub claim_id: Uuid,
        pub state: String,
        #[sea_orm(column_type = "Text", nullable)]
        pub outcome: Option<String>,
        pub fenced: bool,
        pub next_sequence: i64,
        pub log_end: i64,
        pub log_length: Option<i64>,
        pub executor: Option<String>,
        pub claimed_at: i64,
        pub started_at: Option<i64>,
        pub finished_at: Option<i64>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// What each command of an attempt did.
pub mod commands {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "commands")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub action_id: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub number: i32,
        #[sea_orm(primary_key, auto_increment = false)]
        pub index: i32,
        pub log_offset: i64,
        pub log_end: Option<i64>,
        pub exit_code: Option<i32>,
        pub duration_us: Option<i64>,
        pub cpu_user_us: Option<i64>,
        pub cpu_system_us: Option<i64>,
        pub memory_peak_bytes: Option<i64>,
        pub read_bytes: Option<i64>,
        pub write_bytes: Option<i64>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The live log: bytes `start..end`, or a gap there.
pub mod log_chunks {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "log_chunks")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub action_id: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub number: i32,
        #[sea_orm(primary_key, auto_increment = false)]
        pub start: i64,
        pub end: i64,
        /// The bytes as one zstd frame; none for a gap.
        pub data: Option<Vec<u8>>,
        pub gap: Option<String>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The replicas that own pipelines, or may.
pub mod leases {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "leases")]
    pub struct Model {
        /// A replica, new with each start of its process.
        #[sea_orm(primary_key, auto_increment = false)]
        pub owner: Uuid,
        /// Raised by the replica while it owns something unfinished.
        pub counter: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The machines that offer executors.
pub mod agents {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "agents")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        pub name: String,
        pub credential_sha256: Vec<u8>,
        pub public_key: Vec<u8>,
        /// The instance that was first seen last.
        pub current_instance: Option<Uuid>,
        pub drained: bool,
        pub created_at: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Every instance of an agent that was ever seen, so that an older one is never taken for new again.
pub mod agent_instances {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "agent_instances")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        pub agent_id: Uuid,
        pub seen_at: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The re-runs, by their request ids.
pub mod rounds {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "rounds")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub pipeline_id: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub request_id: String,
        pub round: i32,
        pub created_at: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Sequences that both databases have alike. `next` was not given out yet.
pub mod counters {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "counters")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub name: String,
        pub next: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}
