//! Finds out whom an image's programs run as, from the names that the image itself has for users and groups.

use std::fmt;

pub const PASSWD: &str = "/etc/passwd";
pub const GROUP: &str = "/etc/group";
/// More than any image's; what is behind is not looked at.
pub const LIMIT_BYTES: u64 = 1 << 20;
/// An environment's users and groups are those below this, whatever makes it: so what runs in one runs in all.
pub const IDS: u32 = 65_536;
/// As many as any kernel takes would be a description of some megabytes.
const MAX_GROUPS: usize = 256;

/// What is said first where it is the image, or what is asked of it, that stands in the way.
pub const COMPLAINT: &str = "nobody can be run as the user asked for";

/// A user, in ids as seen from inside. Root by default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Account {
    pub uid: u32,
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
}

/// Why nobody can be run as that user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccountError {
    NoUser(String),
    NoGroup(String),
    OutOfReach(u64),
}

impl fmt::Display for AccountError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mend = "name another one, or give its id as a number";
        match self {
            Self::NoUser(name) => write!(f, "the image has no user `{name}` in its {PASSWD}; {mend}"),
            Self::NoGroup(name) => write!(f, "the image has no group `{name}` in its {GROUP}; {mend}"),
            Self::OutOfReach(id) => {
                write!(f, "the id {id} is out of reach: an environment has those below {IDS}")
            }
        }
    }
}

impl std::error::Error for AccountError {}

impl Account {
    /// Reads `user`, `uid`, `user:group` or `uid:gid`, nothing being root, by the texts of an image's [`PASSWD`] and [`GROUP`].
    pub fn find(text: &str, passwd: &str, group: &str) -> Result<Self, AccountError> {
        find(text, passwd, group)
    }
}

/// Of passwd(5) and group(5): a line with its fields.
fn records(file: &str) -> impl Iterator<Item = Vec<&str>> {
    file.lines().map(|line| line.split(':').collect())
}

fn find(text: &str, passwd: &str, group: &str) -> Result<Account, AccountError> {
    let (user, wanted_group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    // A name that is a number is a name first, as everywhere.
    let account = records(passwd)
        .find(|fields| fields.first() == Some(&user))
        .or_else(|| records(passwd).find(|fields| fields.get(2) == Some(&user) && is_number(user)));
    let field = |index: usize| account.as_ref().and_then(|fields| fields.get(index)).copied();
    let uid = match (field(2), is_number(user)) {
        (Some(id), _) if is_number(id) => id_of(id)?,
        (_, true) => id_of(user)?,
        _ => return Err(AccountError::NoUser(user.to_owned())),
    };
    if let Some(wanted) = wanted_group {
        return Ok(Account { uid, gid: group_id(wanted, group)?, groups: Vec::new() });
    }
    let gid = field(3).filter(|id| is_number(id)).map_or(Ok(0), id_of)?;
    let name = field(0);
    let mut groups: Vec<u32> = records(group)
        .filter(|fields| name.is_some_and(|name| fields.get(3).is_some_and(|members| lists(members, name))))
        .filter_map(|fields| id_of(fields.get(2)?).ok())
        .filter(|id| *id != gid)
        .take(MAX_GROUPS)
        .collect();
    groups.sort_unstable();
    groups.dedup();
    Ok(Account { uid, gid, groups })
}

fn lists(members: &str, name: &str) -> bool {
    members.split(',').any(|member| member.trim() == name)
}

fn group_id(wanted: &str, group: &str) -> Result<u32, AccountError> {
    let found = records(group)
        .find(|fields| fields.first() == Some(&wanted))
        .and_then(|fields| fields.get(2).copied())
        .filter(|id| is_number(id));
    match (found, is_number(wanted)) {
        (Some(id), _) => id_of(id),
        (None, true) => id_of(wanted),
        (None, false) => Err(AccountError::NoGroup(wanted.to_owned())),
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn id_of(text: &str) -> Result<u32, AccountError> {
    let id: u64 = text.parse().unwrap_or(u64::MAX);
    u32::try_from(id).ok().filter(|id| *id < IDS).ok_or(AccountError::OutOfReach(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbuild:x:1000:100::/home/build:/bin/sh\n\
        77:x:1001:7::/:\nfar:x:4000000000:1::/:\nbroken\nodd:x:many:1::/:\n";
    const GROUP: &str =
        "root:x:0:\nusers:x:100:build\nvideo:x:44:other,build\ndocker:x:999:build\nfar:x:70000:\n";

    #[test]
    fn every_way_to_name_a_user_is_read() {
        for (text, uid, gid, groups) in [
            ("", 0, 0, &[][..]),
            ("root", 0, 0, &[]),
            ("0", 0, 0, &[]),
            ("build", 1000, 100, &[44, 999]),
            ("1000", 1000, 100, &[44, 999]),
            ("build:", 1000, 100, &[44, 999]),
            ("build:video", 1000, 44, &[]),
            ("build:7", 1000, 7, &[]),
            ("1234", 1234, 0, &[]),
            ("1234:5678", 1234, 5678, &[]),
            (":video", 0, 44, &[]),
            ("77", 1001, 7, &[]),
        ] {
            let expected = Account { uid, gid, groups: groups.to_vec() };
            assert_eq!(find(text, PASSWD, GROUP), Ok(expected), "`{text}`");
        }
        assert_eq!(find("1000:1000", "", ""), Ok(Account { uid: 1000, gid: 1000, groups: Vec::new() }));
    }

    #[test]
    fn what_cannot_be_is_said() {
        for (text, error) in [
            ("nobody", AccountError::NoUser("nobody".into())),
            ("odd", AccountError::NoUser("odd".into())),
            ("build:none", AccountError::NoGroup("none".into())),
            ("-1", AccountError::NoUser("-1".into())),
            ("65536", AccountError::OutOfReach(65536)),
            ("far", AccountError::OutOfReach(4_000_000_000)),
            ("0:far", AccountError::OutOfReach(70_000)),
            ("99999999999999999999999", AccountError::OutOfReach(u64::MAX)),
        ] {
            assert_eq!(find(text, PASSWD, GROUP), Err(error), "`{text}`");
        }
    }
}
