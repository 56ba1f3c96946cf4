//! The tables, as sea-orm sees them.

pub mod configuration {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "monitor_configurations")]
    pub struct Model {
        /// From the database's sequence: order.
        #[sea_orm(primary_key)]
        pub number: i64,
        #[sea_orm(unique)]
        pub id: Uuid,
        pub repository_url: String,
        pub credentials: Option<String>,
        pub events: Json,
        pub branches: Json,
        pub tags: Json,
        pub manifest_path: String,
        pub manifest_digest: Option<String>,
        pub poll_interval_ms: Option<i64>,
        pub enabled: bool,
        pub build_existing: bool,
        /// Whether the repository was looked at before, so that what is new is known to be.
        pub has_baseline: bool,
        pub created_at: String,
        pub last_delivery: Option<Json>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub mod manifest {
    use sea_orm::entity::prelude::*;

    /// Uploaded manifests, by their SHA-256: configurations and events refer to them.
    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "monitor_manifests")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub digest: String,
        pub body: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub mod cursor {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "monitor_cursors")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub configuration: i64,
        #[sea_orm(primary_key, auto_increment = false)]
        pub ref_name: String,
        pub revision: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub mod outbox {
    use sea_orm::entity::prelude::*;

    /// An event as it will be delivered: all that makes its identity is copied here when it is found, so that a repeat
    /// after a crash is the same event whatever was configured meanwhile.
    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "monitor_outbox")]
    pub struct Model {
        #[sea_orm(primary_key)]
        pub sequence: i64,
        pub configuration: i64,
        pub repository_url: String,
        pub kind: String,
        pub ref_name: String,
        pub revision: String,
        pub manifest_path: String,
        pub manifest_digest: Option<String>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}
