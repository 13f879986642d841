//! CPUs, time spent and memory held by this process.

use super::sys::check;
use crate::error::Errno;
use std::time::Duration;

/// The largest CPU number handled (the size of the kernel's default set).
const MAX_CPU: usize = libc::CPU_SETSIZE as usize;

/// The CPUs this process may run on, ascending; never empty.
///
/// `EINVAL` on a machine with more CPUs than the kernel's default set holds.
pub fn allowed() -> Result<Vec<usize>, Errno> {
    // SAFETY: cpu_set_t is a plain bit array, for which all zeroes is a valid value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes at most the size told into `set`, which lives across the call.
    check(unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) })?;
    // SAFETY: `cpu` is below CPU_SETSIZE, so the bit is inside the set.
    let cpus: Vec<usize> = (0..MAX_CPU).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).collect();
    if cpus.is_empty() { Err(Errno::EINVAL) } else { Ok(cpus) }
}

/// Pins the calling thread to one CPU. `EINVAL` if there is no such CPU or it is not allowed.
pub fn pin(cpu: usize) -> Result<(), Errno> {
    if cpu >= MAX_CPU {
        return Err(Errno::EINVAL);
    }
    // SAFETY: as in `allowed`; `cpu` is below CPU_SETSIZE.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        set
    };
    // SAFETY: 0 names the calling thread; `set` lives across the call.
    check(unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) }).map(drop)
}

/// Lets the calling thread's timers fire when they are due, and not up to 50 us later to save wake-ups.
pub fn precise_timers() -> Result<(), Errno> {
    // SAFETY: this prctl takes a number and no pointer.
    check(unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong, 0, 0, 0) }).map(drop)
}

/// The CPU the calling thread runs on now.
pub fn current_cpu() -> Option<usize> {
    // SAFETY: sched_getcpu takes no pointer.
    usize::try_from(unsafe { libc::sched_getcpu() }).ok()
}

/// CPU time of the calling thread, user and system.
pub fn thread_cpu_time() -> Duration {
    clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// CPU time of the whole process, user and system, finished threads included.
pub fn process_cpu_time() -> Duration {
    clock(libc::CLOCK_PROCESS_CPUTIME_ID)
}

fn clock(id: libc::clockid_t) -> Duration {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec, which lives across the call.
    if unsafe { libc::clock_gettime(id, &raw mut t) } != 0 {
        return Duration::ZERO;
    }
    Duration::new(u64::try_from(t.tv_sec).unwrap_or(0), u32::try_from(t.tv_nsec).unwrap_or(0))
}

/// Resident memory of the process in bytes; `None` without /proc.
pub fn resident_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(page_size())
}

/// The largest resident memory so far in bytes.
pub fn peak_resident_bytes() -> Option<u64> {
    let mut u = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel writes one rusage, which lives across the call.
    check(unsafe { libc::getrusage(libc::RUSAGE_SELF, u.as_mut_ptr()) }).ok()?;
    // SAFETY: zeroed and filled; every bit pattern is a valid rusage.
    let u = unsafe { u.assume_init() };
    u64::try_from(u.ru_maxrss).ok()?.checked_mul(1024)
}

/// User and system CPU time of all children that were waited for.
pub fn children_cpu_time() -> (Duration, Duration) {
    let mut u = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel writes one rusage, which lives across the call.
    let _ = unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, u.as_mut_ptr()) };
    // SAFETY: zeroed and perhaps filled; every bit pattern is a valid rusage.
    let u = unsafe { u.assume_init() };
    let time = |t: libc::timeval| {
        Duration::from_secs(u64::try_from(t.tv_sec).unwrap_or(0))
            + Duration::from_micros(u64::try_from(t.tv_usec).unwrap_or(0))
    };
    (time(u.ru_utime), time(u.ru_stime))
}

/// Bytes in a page of memory.
pub fn page_size() -> u64 {
    // SAFETY: sysconf takes no pointer.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: pinning works and shows. Method: pin a thread to the last allowed CPU and look where it runs.
    #[test]
    fn pins() {
        let cpu = *allowed().expect("affinity").last().expect("a CPU");
        std::thread::spawn(move || {
            pin(cpu).expect("pin");
            assert_eq!(current_cpu(), Some(cpu));
            assert_eq!(allowed(), Ok(vec![cpu]));
            assert!(pin(1 << 20).is_err());
        })
        .join()
        .expect("thread");
    }

    /// Goal: the clocks move with work and the process's includes the thread's.
    #[test]
    fn clocks_count_work() {
        let (t0, p0) = (thread_cpu_time(), process_cpu_time());
        let mut x = 1u64;
        while thread_cpu_time() < t0 + Duration::from_millis(5) {
            x = std::hint::black_box(x.wrapping_mul(31));
        }
        assert!(process_cpu_time() >= p0 + Duration::from_millis(4));
        let rss = resident_bytes().expect("/proc");
        assert!(rss > 100_000 && peak_resident_bytes().is_some_and(|p| p + (16 << 20) >= rss));
    }
}
