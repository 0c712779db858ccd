//! Audit records on disk: one file per day.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::writer::Sink;

/// Appends to `audit-YYYYMMDD.jsonl`. Files are readable by their owner only.
#[derive(Debug)]
pub(crate) struct FileSink {
    dir: PathBuf,
    open: Option<(u32, File)>,
}

impl FileSink {
    /// Makes the directory and checks that a file can be made in it, so that a mistake shows at start.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        let mut builder = DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(dir)?;
        let probe = dir.join(".writable");
        File::create(&probe)?;
        std::fs::remove_file(&probe)?;
        Ok(Self { dir: dir.to_owned(), open: None })
    }

    fn file(&mut self, day: u32) -> io::Result<&mut File> {
        if self.open.as_ref().is_none_or(|(open, _)| *open != day) {
            let mut options = OpenOptions::new();
            options.append(true).create(true);
            #[cfg(unix)]
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
            self.open = Some((day, options.open(self.dir.join(format!("audit-{day:08}.jsonl")))?));
        }
        let (_, file) = self.open.as_mut().expect("opened above");
        Ok(file)
    }
}

impl Sink for FileSink {
    /// All lines or none: a write that fails half-way (a full disk) is taken back, so that repeating it leaves neither
    /// a torn line nor a double one.
    fn append(&mut self, day: u32, lines: &[u8]) -> io::Result<()> {
        let file = self.file(day)?;
        let before = file.metadata()?.len();
        let written = file.write_all(lines);
        if written.is_err() {
            let _ = file.set_len(before);
            // Perhaps the file itself is the trouble (a volume that was taken away): open it anew next time.
            self.open = None;
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_per_day() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("deep/audit");
        let mut sink = FileSink::open(&dir).unwrap();
        sink.append(20260101, b"a\n").unwrap();
        sink.append(20260101, b"b\n").unwrap();
        sink.append(20260102, b"c\n").unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
        assert_eq!(read("audit-20260101.jsonl"), "a\nb\n");
        assert_eq!(read("audit-20260102.jsonl"), "c\n");
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 2, "the probe is gone");
        let mut again = FileSink::open(&dir).unwrap();
        again.append(20260102, b"d\n").unwrap();
        assert_eq!(read("audit-20260102.jsonl"), "c\nd\n");
    }

    #[cfg(unix)]
    #[test]
    fn only_the_owner_reads() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let mut sink = FileSink::open(dir.path()).unwrap();
        sink.append(20260101, b"a\n").unwrap();
        let mode = std::fs::metadata(dir.path().join("audit-20260101.jsonl")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_place_that_can_not_be_used_shows_at_start() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(FileSink::open(&file.path().join("audit")).is_err());
    }
}
