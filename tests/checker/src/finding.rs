//! What can be wrong: a kind, a place and a value, put into words only when somebody asks.

/// One thing that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is wrong.
    pub kind: Kind,
    /// Where: an offset, a cluster or an index, as the kind says.
    pub at: u64,
    /// The value found.
    pub value: u64,
}

macro_rules! kinds {
    ($($name:ident: $text:literal),* $(,)?) => {
        /// The kinds of faults.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Kind {
            $(#[doc = $text] $name,)*
        }

        impl Kind {
            /// Every kind there is.
            pub const ALL: &[Kind] = &[$(Kind::$name),*];

            fn text(self) -> &'static str {
                match self {
                    $(Kind::$name => $text,)*
                }
            }
        }
    };
}

impl Kind {
    /// Whether it follows from refcounts alone, which a dirty image may have wrong.
    pub fn is_about_counts(self) -> bool {
        matches!(self, Kind::TooFewRefs | Kind::CopiedL1 | Kind::CopiedL2 | Kind::Leak)
    }
}

kinds! {
    Magic: "the magic number is wrong",
    Version: "the version is not 2 or 3",
    ClusterBits: "clusters of an impossible size",
    HeaderLength: "the header's length is impossible",
    BackingName: "the name of the backing file lies outside the first cluster",
    Incompatible: "an unknown incompatible feature",
    RefcountOrder: "refcounts of more than 64 bits",
    Encryption: "encrypted: not checked without a key",
    ReftableSize: "a refcount table that is too large",
    ReftableOffset: "the refcount table's offset is impossible",
    L1Size: "an L1 table that is too large, or too small for the disk",
    L1Offset: "the L1 table's offset is impossible",
    Extension: "a header extension is malformed",
    BitmapsExtension: "the bitmaps extension is malformed",
    CompressionType: "compression type and feature bit contradict each other",
    DataFile: "the external data file is missing, or there should be none",
    Leak: "leaked cluster (value: its refcount)",
    TooFewRefs: "cluster with a refcount that is too low (value: the refcount)",
    BeyondEnd: "a reference one cluster or more beyond the end of the file",
    Overflow: "more references than a refcount can hold",
    L1Reserved: "reserved bits set in an L1 entry",
    L2Unaligned: "an L2 table that is not cluster aligned",
    L2Reserved: "reserved bits set in an L2 entry",
    CompressedCopied: "a compressed cluster with the COPIED flag",
    CompressedBitmap: "a compressed cluster with a subcluster bitmap",
    CompressedData: "a compressed cluster beside an external data file",
    SubclusterBoth: "subclusters both allocated and zero",
    SubclusterNone: "subclusters allocated in a cluster that is not",
    ClusterUnaligned: "a data cluster that is not cluster aligned",
    CopiedL1: "COPIED flag of an L1 entry against its refcount",
    CopiedL2: "COPIED flag of an L2 entry against its refcount",
    ReftableReserved: "reserved bits set in a refcount table entry",
    RefblockUnaligned: "a refcount block that is not cluster aligned",
    RefblockOutside: "a refcount block outside the file",
    RefblockShared: "a refcount block with another use (value: references)",
    RefcountUnread: "a refcount that cannot be read",
    SnapshotTable: "the snapshot table is malformed",
    SnapshotIncomplete: "a snapshot without the extra data that version 3 wants",
    SnapshotL1: "a snapshot's L1 table is impossible",
    SnapshotsData: "snapshots beside an external data file",
    BitmapDirectory: "the bitmap directory is malformed",
    BitmapEntryInvalid: "a bitmap that does not satisfy the constraints of the format",
    BitmapTable: "a bitmap table is impossible",
    BitmapEntry: "an impossible entry of a bitmap table",
    DataOffset: "host and guest offset differ with an external data file",
    ZeroV2: "a zero cluster in a version 2 image",
    Compressed: "a compressed cluster does not decompress",
    NoSuchSnapshot: "there is no such snapshot",
    Tangled: "tables that overlap so much that checking was given up",
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {:#x}: {:#x}", self.kind.text(), self.at, self.value)
    }
}
