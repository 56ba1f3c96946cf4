//! Opens a service's database: an embedded SQLite file, or PostgreSQL.
//!
//! SQLite is one process's: a lock on `<file>.lock`, held for as long as the database is open and not passed on to child
//! processes, keeps a second one out. What is committed is on disk (`synchronous=FULL`), but for scratch. What could not be
//! committed leaves nothing behind: the connection that failed is not used again where it may have lost count.

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sea_orm::sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sea_orm::sqlx::{Connection as _, SqliteConnection};
use sea_orm::{ConnectOptions, DatabaseConnection, DbErr};

/// How long a connection may be waited for, and a writer for another.
const PATIENCE: Duration = Duration::from_secs(10);
/// Scratch has one: its process would sooner wait for it than for the next one to be opened.
const READERS: u32 = 4;
const POSTGRES_CONNECTIONS: u32 = 10;
const IDLE_IN_TRANSACTION: &str = "5s";

/// Where a database is.
#[derive(Clone, PartialEq, Eq)]
pub enum DatabaseUrl {
    Sqlite(PathBuf),
    /// An SQLite file that is of no use after this process, and so waits for no disk.
    Scratch(PathBuf),
    /// `postgres://user:password@host:port/name`
    Postgres(String),
}

/// A text that names no database.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the database must be a file's path, `sqlite:///path` or `postgres://user@host/name`")]
pub struct InvalidDatabaseUrl;

impl std::str::FromStr for DatabaseUrl {
    type Err = InvalidDatabaseUrl;

    fn from_str(text: &str) -> Result<Self, InvalidDatabaseUrl> {
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return Ok(Self::Postgres(text.to_owned()));
        }
        let path = text.strip_prefix("sqlite://").unwrap_or(text);
        if path.is_empty() || path.contains("://") || path.contains('\0') || path.starts_with(':') {
            return Err(InvalidDatabaseUrl);
        }
        Ok(Self::Sqlite(PathBuf::from(path)))
    }
}

impl fmt::Display for DatabaseUrl {
    /// Without user and password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) | Self::Scratch(path) => write!(f, "sqlite://{}", path.display()),
            Self::Postgres(url) => {
                let rest = url.split_once("://").map_or("", |(_, rest)| rest);
                write!(f, "postgres://{}", rest.rsplit_once('@').map_or(rest, |(_, host)| host))
            }
        }
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a database could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    #[error("the database {} is in use by {holder}: one process at a time, or use PostgreSQL", path.display())]
    InUse { path: PathBuf, holder: String },
    #[error("cannot make or lock the file {}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("cannot connect to {url}")]
    Connect { url: DatabaseUrl, source: DbErr },
}

/// An open database. Cheap to clone; the last clone to go gives the file back.
#[derive(Debug, Clone)]
pub struct Database {
    /// For SQLite one connection, so that transactions that write never meet; for PostgreSQL a pool.
    pub writer: DatabaseConnection,
    /// For SQLite connections that cannot write, and see what was last committed; for PostgreSQL the writer's pool.
    pub readers: DatabaseConnection,
    lock: Option<Arc<File>>,
}

impl Database {
    pub async fn open(url: &DatabaseUrl) -> Result<Self, DatabaseError> {
        let fail = |source| DatabaseError::Connect { url: url.clone(), source };
        match url {
            DatabaseUrl::Sqlite(path) | DatabaseUrl::Scratch(path) => {
                let is_durable = matches!(url, DatabaseUrl::Sqlite(_));
                let lock = lock(path)?;
                make_private(path)?;
                let options = |read_only| sqlite_options(path, read_only, is_durable);
                let writer = sea_orm::Database::connect(options(false)).await.map_err(fail)?;
                let readers = sea_orm::Database::connect(options(true)).await.map_err(fail)?;
                Ok(Self { writer, readers, lock: Some(Arc::new(lock)) })
            }
            DatabaseUrl::Postgres(text) => {
                let mut options = ConnectOptions::new(text);
                options
                    .max_connections(POSTGRES_CONNECTIONS)
                    .acquire_timeout(PATIENCE)
                    .connect_timeout(PATIENCE)
                    .sqlx_logging(false)
                    // What a process that is stopped has locked is free again soon.
                    .map_sqlx_postgres_opts(|postgres| {
                        postgres.options([("idle_in_transaction_session_timeout", IDLE_IN_TRANSACTION)])
                    });
                let pool = sea_orm::Database::connect(options).await.map_err(fail)?;
                Ok(Self { writer: pool.clone(), readers: pool, lock: None })
            }
        }
    }

    /// Whether this is SQLite, which only one process has open.
    pub fn is_embedded(&self) -> bool {
        self.lock.is_some()
    }

    /// Closes the connections; after this the file can be opened by another process at once.
    pub async fn close(self) -> Result<(), DbErr> {
        self.readers.close_by_ref().await?;
        self.writer.close_by_ref().await
    }
}

fn sqlite_options(path: &Path, read_only: bool, is_durable: bool) -> ConnectOptions {
    let mut options = ConnectOptions::new("sqlite:database");
    options
        .max_connections(if read_only && is_durable { READERS } else { 1 })
        .min_connections(1)
        .acquire_timeout(PATIENCE)
        .connect_timeout(PATIENCE)
        // A connection to a file does not grow stale, and opening one anew costs.
        .idle_timeout(None::<Duration>)
        .max_lifetime(None::<Duration>)
        .test_before_acquire(false)
        .sqlx_logging(false);
    let path = path.to_owned();
    options.map_sqlx_sqlite_opts(move |sqlite: SqliteConnectOptions| {
        // Set here and not in the URL, where a path would have to be escaped.
        let sqlite = sqlite.filename(&path).create_if_missing(!read_only);
        let sqlite =
            sqlite.synchronous(if is_durable { SqliteSynchronous::Full } else { SqliteSynchronous::Off });
        let sqlite = if is_durable {
            sqlite.journal_mode(SqliteJournalMode::Wal)
        } else {
            // The library would choose it before all else, and a new file is synced four times for that. Under this name
            // it is chosen in the order of these lines.
            sqlite.pragma("main.journal_mode", "WAL")
        };
        sqlite
            .busy_timeout(PATIENCE)
            .foreign_keys(true)
            .pragma("query_only", if read_only { "ON" } else { "OFF" })
            .statement_cache_capacity(256)
    });
    if !read_only {
        options.map_sqlx_sqlite_pool_opts(|pool| {
            pool.after_release(|connection, _| Box::pin(has_no_transaction(connection)))
        });
    }
    options
}

/// Whether a connection that is given back may serve again; it is closed otherwise, before anybody else has it.
///
/// SQLite ends some failed transactions by itself (a full disk), and the library that counts them does not learn of it: what
/// it would take for a commit from then on is only the end of a nested transaction, seen by this connection and by nobody
/// else, and lost when it closes.
async fn has_no_transaction(connection: &mut SqliteConnection) -> Result<bool, sea_orm::sqlx::Error> {
    // The end of a transaction that was dropped is still on its way; the answer comes after it.
    connection.ping().await?;
    let has_none = !connection.is_in_transaction();
    if !has_none {
        tracing::warn!("a transaction failed halfway; what follows begins on a new connection");
    }
    Ok(has_none)
}

/// Takes the lock file, or says who has it.
fn lock(database: &Path) -> Result<File, DatabaseError> {
    if let Some(folder) = database.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder)
            .map_err(|source| DatabaseError::File { path: folder.to_owned(), source })?;
    }
    let mut name = database.as_os_str().to_owned();
    name.push(".lock");
    let path = PathBuf::from(name);
    let fail = |source| DatabaseError::File { path: path.clone(), source };
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true).mode(0o600);
    let mut file = options.open(&path).map_err(fail)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = (&mut file).take(200).read_to_string(&mut holder);
            let holder = holder.trim();
            let holder = if holder.is_empty() { "another process" } else { holder }.to_owned();
            return Err(DatabaseError::InUse { path: database.to_owned(), holder });
        }
        Err(TryLockError::Error(source)) => return Err(fail(source)),
    }
    let program = std::env::current_exe().ok();
    let program = program.as_deref().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let holder = format!("process {} ({program})\n", std::process::id());
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| file.write_all(holder.as_bytes()))
        .map_err(fail)?;
    Ok(file)
}

/// Makes the file before SQLite does, readable by its owner only.
fn make_private(path: &Path) -> Result<(), DatabaseError> {
    let made = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    made.map(drop).map_err(|source| DatabaseError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sea_orm::{ConnectionTrait as _, Statement, TransactionTrait as _};

    async fn ask(connection: &DatabaseConnection, question: &str) -> String {
        let statement = Statement::from_string(connection.get_database_backend(), question);
        let row = connection.query_one_raw(statement).await.unwrap().unwrap();
        row.try_get_by_index::<String>(0)
            .or_else(|_| row.try_get_by_index::<i64>(0).map(|number| number.to_string()))
            .unwrap()
    }

    #[tokio::test]
    async fn sqlite_is_durable_guarded_and_private() {
        let folder = tempfile::tempdir().unwrap();
        // A path that would mean something else inside a URL.
        let path = folder.path().join("new folder/100%?mode=memory#x.db");
        let url: DatabaseUrl = format!("sqlite://{}", path.display()).parse().unwrap();
        let database = Database::open(&url).await.unwrap();
        for connection in [&database.writer, &database.readers] {
            assert_eq!(ask(connection, "PRAGMA journal_mode").await, "wal");
            assert_eq!(ask(connection, "PRAGMA synchronous").await, "2");
            assert_eq!(ask(connection, "PRAGMA foreign_keys").await, "1");
        }
        database.writer.execute_unprepared("CREATE TABLE t (x INTEGER)").await.unwrap();
        assert!(database.readers.execute_unprepared("INSERT INTO t VALUES (1)").await.is_err());
        database.writer.execute_unprepared("INSERT INTO t VALUES (7)").await.unwrap();
        assert_eq!(ask(&database.readers, "SELECT x FROM t").await, "7");

        let refused = Database::open(&url).await.unwrap_err().to_string();
        assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&path).unwrap());
        assert_eq!(mode & 0o777, 0o600);

        database.close().await.unwrap();
        let again = Database::open(&url).await.unwrap();
        assert_eq!(ask(&again.readers, "SELECT x FROM t").await, "7");
    }

    #[tokio::test]
    async fn a_transaction_that_found_no_room_spoils_none_after_it() {
        let folder = tempfile::tempdir().unwrap();
        let url = DatabaseUrl::Sqlite(folder.path().join("x.db"));
        let database = Database::open(&url).await.unwrap();
        database.writer.execute_unprepared("CREATE TABLE t (x INTEGER, y BLOB)").await.unwrap();
        // No room beyond what is there, as on a full disk, for this connection.
        ask(&database.writer, "PRAGMA max_page_count = 1").await;
        let transaction = database.writer.begin().await.unwrap();
        let written = transaction.execute_unprepared("INSERT INTO t VALUES (1, zeroblob(100000))").await;
        assert!(written.unwrap_err().to_string().contains("full"));
        drop(transaction);
        let next = database.writer.begin().await.unwrap();
        next.execute_unprepared("INSERT INTO t VALUES (2, zeroblob(100000))").await.unwrap();
        next.commit().await.unwrap();
        assert_eq!(ask(&database.readers, "SELECT sum(x) FROM t").await, "2");
        database.close().await.unwrap();
        let again = Database::open(&url).await.unwrap();
        assert_eq!(ask(&again.readers, "SELECT sum(x) FROM t").await, "2");
    }

    #[tokio::test]
    async fn scratch_waits_for_no_disk() {
        let folder = tempfile::tempdir().unwrap();
        let url = DatabaseUrl::Scratch(folder.path().join("x.db"));
        let database = Database::open(&url).await.unwrap();
        assert_eq!(ask(&database.writer, "PRAGMA synchronous").await, "0");
        assert_eq!(ask(&database.readers, "PRAGMA journal_mode").await, "wal");
    }

    #[test]
    fn urls_are_told_apart_and_shown_without_their_password() {
        assert_eq!("/a/b.db".parse(), Ok(DatabaseUrl::Sqlite("/a/b.db".into())));
        assert_eq!("sqlite:///a/b.db".parse(), Ok(DatabaseUrl::Sqlite("/a/b.db".into())));
        let url: DatabaseUrl = "postgres://me:hunter2@h:5432/db".parse().unwrap();
        assert_eq!(format!("{url} {url:?}"), "postgres://h:5432/db postgres://h:5432/db");
        for bad in ["", "mysql://h/db", "sqlite://", ":memory:"] {
            assert!(bad.parse::<DatabaseUrl>().is_err(), "{bad}");
        }
    }
}
