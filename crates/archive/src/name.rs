//! Decides which names an entry may have.

/// The longest name, as Linux has it.
const MAX_NAME_BYTES: usize = 4096;

/// The name without `.` and doubled slashes; empty for the root itself. None for one that is absolute, leads upwards, or is
/// too long.
pub fn relative_name(name: &str) -> Option<String> {
    if name.starts_with('/') || name.contains('\0') || name.len() > MAX_NAME_BYTES {
        return None;
    }
    let parts: Vec<&str> = name.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    (!parts.contains(&"..")).then(|| parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::relative_name;

    #[test]
    fn names_stay_below_their_folder() {
        for (name, clean) in
            [("a", "a"), ("./a//b/", "a/b"), (".", ""), ("./", ""), ("a/..b", "a/..b"), ("...", "...")]
        {
            assert_eq!(relative_name(name).as_deref(), Some(clean), "{name}");
        }
        for name in ["/a", "..", "a/../b", "a/..", "../a", "a\0b", &"x".repeat(4097)] {
            assert_eq!(relative_name(name), None, "{name}");
        }
    }
}
