//! Local calendar time.

/// A moment in local time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Calendar {
    /// Year, 1970 and later.
    pub year: i64,
    /// Month, 1 to 12.
    pub month: u8,
    /// Day, 1 to 31.
    pub day: u8,
    /// Hour, minute, second.
    pub time: (u8, u8, u8),
}

impl std::fmt::Display for Calendar {
    /// "2026-11-22 16:26:59"
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (h, m, s) = self.time;
        write!(f, "{:04}-{:02}-{:02} {h:02}:{m:02}:{s:02}", self.year, self.month, self.day)
    }
}

/// Seconds since 1970 in the local zone; `None` if that cannot be told.
pub fn local(seconds: u64) -> Option<Calendar> {
    let t = libc::time_t::try_from(seconds).ok()?;
    let mut tm = std::mem::MaybeUninit::<libc::tm>::zeroed();
    // SAFETY: both pointers are to live memory of this frame of the right type.
    if unsafe { libc::localtime_r(&raw const t, tm.as_mut_ptr()) }.is_null() {
        return None;
    }
    // SAFETY: zeroed is a valid `tm`, and the call has filled it.
    let tm = unsafe { tm.assume_init() };
    let small = |n: libc::c_int| u8::try_from(n).ok();
    Some(Calendar {
        year: i64::from(tm.tm_year) + 1900,
        month: small(tm.tm_mon + 1)?,
        day: small(tm.tm_mday)?,
        time: (small(tm.tm_hour)?, small(tm.tm_min)?, small(tm.tm_sec)?),
    })
}
