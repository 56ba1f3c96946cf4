//! Opens databases: SQLite in a file that one process owns, or PostgreSQL.
//!
//! SQLite is durable (write-ahead log, every commit synced) and guarded: a second process that opens the same file is
//! told who has it. There is one connection that writes, so writers queue here and not in SQLite's busy handler.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use sea_orm::{DatabaseConnection, SqlxPostgresConnector, SqlxSqliteConnector};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};

/// Reading connections of one service.
const READERS: u32 = 4;

/// Where a database is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A file; made if it is not there.
    Sqlite(PathBuf),
    /// A URL, `postgres://user:password@host/name`. It may hold a password: never shown.
    Postgres(String),
}

impl FromStr for Location {
    type Err = DatabaseError;

    /// `postgres://…`, `sqlite:PATH` or a path.
    fn from_str(text: &str) -> Result<Self, DatabaseError> {
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return Ok(Self::Postgres(text.to_owned()));
        }
        match text.strip_prefix("sqlite:").unwrap_or(text) {
            "" => Err(DatabaseError::Location),
            path if path.contains("://") => Err(DatabaseError::Location),
            path => Ok(Self::Sqlite(path.into())),
        }
    }
}

/// Why a database could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    #[error("a database is a file's path or a postgres:// URL")]
    Location,
    #[error("cannot lock {path}")]
    Lock { path: PathBuf, source: std::io::Error },
    #[error(
        "{path} is in use by process {holder}: a SQLite database has one process; stop the other, or use PostgreSQL"
    )]
    InUse { path: PathBuf, holder: String },
    #[error("cannot open the SQLite database {path}")]
    Sqlite { path: PathBuf, source: sqlx::Error },
    #[error("cannot connect to PostgreSQL")]
    Postgres(#[source] sqlx::Error),
}

/// An open database. A SQLite file is this process's until this is dropped.
#[derive(Debug)]
pub struct Database {
    /// Writes, and reads what was just written. For SQLite, a single connection.
    pub writer: DatabaseConnection,
    /// Only reads.
    pub readers: DatabaseConnection,
    _guard: Option<Flock<File>>,
}

impl Database {
    /// Opens the database, waiting for nobody.
    pub async fn open(location: &Location) -> Result<Self, DatabaseError> {
        match location {
            Location::Sqlite(path) => Self::open_sqlite(path).await,
            Location::Postgres(url) => Self::open_postgres(url).await,
        }
    }

    async fn open_sqlite(path: &Path) -> Result<Self, DatabaseError> {
        let guard = own(path)?;
        let failed = |source| DatabaseError::Sqlite { path: path.to_owned(), source };
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(10));
        let pool =
            |size| SqlitePoolOptions::new().max_connections(size).idle_timeout(None).max_lifetime(None);
        let writer = pool(1).connect_with(options.clone()).await.map_err(failed)?;
        let readers = pool(READERS).connect_with(options.read_only(true)).await.map_err(failed)?;
        Ok(Self {
            writer: SqlxSqliteConnector::from_sqlx_sqlite_pool(writer),
            readers: SqlxSqliteConnector::from_sqlx_sqlite_pool(readers),
            _guard: Some(guard),
        })
    }

    async fn open_postgres(url: &str) -> Result<Self, DatabaseError> {
        let options = PgConnectOptions::from_str(url)
            .map_err(DatabaseError::Postgres)?
            .options([("idle_in_transaction_session_timeout", "5s")]);
        let pool = |size| PgPoolOptions::new().max_connections(size).acquire_timeout(Duration::from_secs(10));
        let writer = pool(2).connect_with(options.clone()).await.map_err(DatabaseError::Postgres)?;
        let readers = pool(READERS).connect_with(options).await.map_err(DatabaseError::Postgres)?;
        Ok(Self {
            writer: SqlxPostgresConnector::from_sqlx_postgres_pool(writer),
            readers: SqlxPostgresConnector::from_sqlx_postgres_pool(readers),
            _guard: None,
        })
    }
}

/// Makes a file this process's own, by a lock beside it that ends with the process and is not inherited.
fn own(path: &Path) -> Result<Flock<File>, DatabaseError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".lock");
    let lock_path = PathBuf::from(beside);
    let failed = |source| DatabaseError::Lock { path: lock_path.clone(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    // The standard library opens files close-on-exec.
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&lock_path);
    match Flock::lock(file.map_err(failed)?, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            lock.set_len(0).map_err(failed)?;
            lock.write_all(std::process::id().to_string().as_bytes()).map_err(failed)?;
            Ok(lock)
        }
        Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
            let mut holder = String::new();
            let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_string(&mut holder));
            let holder = if read.is_ok() && !holder.is_empty() { holder } else { "unknown".into() };
            Err(DatabaseError::InUse { path: path.to_owned(), holder })
        }
        Err((_, errno)) => Err(failed(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sea_orm::{ConnectionTrait, Statement};

    async fn pragma(connection: &DatabaseConnection, name: &str) -> String {
        let statement = Statement::from_string(sea_orm::DbBackend::Sqlite, format!("PRAGMA {name}"));
        let row = connection.query_one_raw(statement).await.unwrap().unwrap();
        row.try_get_by_index::<String>(0)
            .or_else(|_| row.try_get_by_index::<i64>(0).map(|value| value.to_string()))
            .unwrap()
    }

    #[tokio::test]
    async fn sqlite_is_durable() {
        let folder = tempfile::tempdir().unwrap();
        let location = Location::Sqlite(folder.path().join("deep/er/db.sqlite"));
        let database = Database::open(&location).await.unwrap();
        assert_eq!(pragma(&database.writer, "journal_mode").await, "wal");
        assert_eq!(pragma(&database.writer, "synchronous").await, "2");
        assert_eq!(pragma(&database.writer, "foreign_keys").await, "1");
    }

    #[tokio::test]
    async fn a_second_opener_is_told_who_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let location = Location::Sqlite(folder.path().join("db.sqlite"));
        let first = Database::open(&location).await.unwrap();
        let refused = Database::open(&location).await.unwrap_err().to_string();
        assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
        drop(first);
        Database::open(&location).await.unwrap();
    }

    #[test]
    fn locations_are_told_apart() {
        assert_eq!("sqlite:/a/b".parse::<Location>().unwrap(), Location::Sqlite("/a/b".into()));
        assert_eq!("data/x.db".parse::<Location>().unwrap(), Location::Sqlite("data/x.db".into()));
        assert!(matches!("postgres://h/d".parse::<Location>().unwrap(), Location::Postgres(_)));
        assert!("mysql://h/d".parse::<Location>().is_err());
        assert!("".parse::<Location>().is_err());
    }
}
