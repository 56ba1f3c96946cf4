//! Maps the tables of what is kept of actions. The bytes are in the object store; nothing there counts without a row here.

/// Keys that all replicas share, made by the first that needs one.
pub mod shared_keys {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "shared_keys")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub name: String,
        pub key: Vec<u8>,
    }

    impl std::fmt::Debug for Model {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Model").field("name", &self.name).finish_non_exhaustive()
        }
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Objects for which nothing stands: being written, or to be deleted. Every object has a row here, in `blobs`, or in
/// `finished_logs`.
pub mod loose_objects {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "loose_objects")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub object: String,
        /// The store's name of an upload in parts that may be unfinished.
        pub multipart: Option<String>,
        pub since: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Bytes that are kept, once for each digest.
pub mod blobs {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "blobs")]
    pub struct Model {
        /// `sha256:` and 64 hexadecimal digits.
        #[sea_orm(primary_key, auto_increment = false)]
        pub digest: String,
        /// Its name in the object store; another one for each upload.
        pub object: String,
        pub size_bytes: i64,
        pub created_at: i64,
        /// When it was last brought, referred to, or found.
        pub touched_at: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Who has shown that they have a blob's bytes. A digest alone opens nothing.
pub mod blob_owners {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "blob_owners")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub digest: String,
        /// SHA-256 of the repository and the trust scope, in hexadecimal.
        #[sea_orm(primary_key, auto_increment = false)]
        pub owner: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// What attempts keep for people and for later actions.
pub mod artifacts {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "artifacts")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        pub pipeline_id: Uuid,
        pub action_id: Uuid,
        /// The attempt's.
        pub number: i32,
        /// `files` or `service_log`.
        pub kind: String,
        /// The service's, of a service_log; empty otherwise.
        pub name: String,
        pub digest: String,
        pub size_bytes: i64,
        pub unpacked_bytes: i64,
        pub files: i64,
        pub created_at: i64,
        pub expires_at: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The entries of all caches.
pub mod caches {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "caches")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        /// SHA-256 of repository, scope and key, in hexadecimal: unique, and short enough for any database's index.
        #[sea_orm(unique)]
        pub identity: String,
        #[sea_orm(column_type = "Text")]
        pub repository: String,
        /// Empty: the base's; else `pull_request:<ref>`.
        #[sea_orm(column_type = "Text")]
        pub scope: String,
        #[sea_orm(column_type = "Text")]
        pub key: String,
        pub digest: String,
        pub size_bytes: i64,
        pub unpacked_bytes: i64,
        pub files: i64,
        pub created_at: i64,
        pub last_used_at: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// What the tests of attempts did.
pub mod test_reports {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "test_reports")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub action_id: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub number: i32,
        /// The API's `TestReport`, as JSON, bounded.
        #[sea_orm(column_type = "Text")]
        pub report: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Logs that are whole and have moved out of `log_chunks`, where only their gaps stay. A row here decides: from then on the
/// object is the log, whatever chunks are still to be deleted.
pub mod finished_logs {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "finished_logs")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub action_id: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub number: i32,
        /// Its name in the object store.
        pub object: String,
        /// The object's.
        pub size_bytes: i64,
        /// Of the log, those in its gaps: they are not in the object.
        pub missing_bytes: i64,
        /// When the controller moved it: an agent's clock does not say how long it is kept.
        pub moved_at: i64,
        pub deleted_at: Option<i64>,
        /// Why it was deleted, for people.
        #[sea_orm(column_type = "Text", nullable)]
        pub deleted_because: Option<String>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}
