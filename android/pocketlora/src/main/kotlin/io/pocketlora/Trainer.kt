package io.pocketlora

import java.util.concurrent.atomic.AtomicReference
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.channels.awaitClose
import kotlinx.coroutines.channels.trySendBlocking
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.callbackFlow
import kotlinx.coroutines.launch

/** A question with the answer to be learned. */
data class Example(val question: String, val answer: String) {
    internal fun line() = json(
        mapOf("messages" to listOf(Message("user", question).map(), Message("assistant", answer).map())),
    )
}

/** What becomes of an earlier run in the folder. */
enum class Start(internal val key: String) {
    /** It is not touched: the new run is refused. */
    NEW("new"),

    /** The new run takes its place. */
    REPLACE("replace"),

    /** It goes on from its checkpoint, also in another process; without one a new run begins. */
    RESUME("resume"),
}

/** What is learned, and how. */
data class TrainingOptions(
    /** The folder for checkpoints and the adapter. */
    val out: String,
    /** Learned from; kept in [out], so that a run that is resumed needs neither these nor [data]. */
    val examples: List<Example>? = null,
    /** A file or folder of data instead. */
    val data: String? = null,
    val start: Start = Start.NEW,
    /** The folder of an adapter that learns on. */
    val init: String? = null,
    /** Has a short probe choose the settings that are not given. */
    val choose: Boolean = true,
    /** The run ends with the first step that is done then, and writes the adapter. */
    val seconds: Double? = null,
    /** Settings by the names of `train.toml`: `steps`, `lr`, `rank`, `memory-budget` (in MB) and so on. */
    val settings: Map<String, Any> = emptyMap(),
) {
    internal fun json() = json(
        mapOf(
            "out" to out, "data" to data, "start" to start.key, "init" to init, "choose" to choose,
            "seconds" to seconds, "settings" to settings,
        ),
    )
}

/** What a run is told to do. */
enum class Directive { RUN, PAUSE, STOP }

/** What a run tells. */
sealed class TrainingEvent {
    /** A step was done. [heldOutLoss] is null where nothing was evaluated after it. */
    data class Step(
        val step: Long,
        val steps: Long,
        val loss: Double,
        val heldOutLoss: Double?,
        val tokensPerSecond: Double,
        val learningRate: Double,
    ) : TrainingEvent()

    /** Work before or between steps. */
    data class Progress(val kind: Kind, val done: Long, val all: Long, val what: String) : TrainingEvent() {
        enum class Kind { BEGINNING, PREPARING, CHECKING }
    }

    /** Something that the run outlives. */
    data class Warning(val message: String) : TrainingEvent()

    /** The run came to its end and the adapter is written, or it was stopped with a checkpoint: [done] tells. */
    data class End(
        val done: Boolean,
        val steps: Long,
        val loss: Double,
        val heldOutBefore: Double?,
        val heldOutAfter: Double?,
        val seconds: Double,
        val peakBytes: Long,
        /** The adapter's folder. */
        val adapter: String,
    ) : TrainingEvent()
}

/** What a run is. */
data class TrainerInfo(
    val step: Long,
    val steps: Long,
    val parameters: Long,
    /** Dirty bytes that it will take beside the open model: planned, and kept to. */
    val plannedBytes: Long,
    /** It goes on from a checkpoint. */
    val resumed: Boolean,
)

/**
 * A run between two steps, or at work. A kill of the process at any instant loses no more than the steps since the last
 * checkpoint; [Start.RESUME] goes on from there, with the result of a run that was never interrupted.
 */
class Trainer private constructor(number: Long) : Handle(number) {
    @Volatile private var stopped = false

    /** What it is. Not while it runs. */
    suspend fun info(): TrainerInfo = offMain {
        Native.trainerInfo(id).let { TrainerInfo(it[0], it[1], it[2], it[3], it[4] != 0L) }
    }

    /**
     * Runs to the end, or until it is stopped; the last event is [TrainingEvent.End]. Cancelling the collector stops the run
     * within the time of a layer, with a checkpoint; it can be run again. [policy] is asked many times a second, on the
     * run's thread, whether to work: only while the device charges and is cool, say. What it throws ends the run.
     */
    fun run(policy: () -> Directive = { Directive.RUN }): Flow<TrainingEvent> = callbackFlow {
        if (stopped) {
            Native.trainerOrder(id, Directive.RUN.ordinal)
            stopped = false
        }
        val listener = Listener(policy) { trySendBlocking(it).isSuccess }
        val work = launch(Dispatchers.IO) {
            Native.trainerRun(id, listener)
            close()
        }
        awaitClose {
            if (work.isActive) stop()
        }
    }

    /** Holds the run within the time of a layer; [resume] lets it go on. It keeps its memory meanwhile. */
    fun pause() = Native.trainerOrder(id, Directive.PAUSE.ordinal)

    /** Waits until it is held. */
    suspend fun awaitPaused(milliseconds: Long = 10_000): Boolean = offMain { Native.trainerWaitPaused(id, milliseconds) }

    fun resume() = Native.trainerOrder(id, Directive.RUN.ordinal)

    /** Stops the run within the time of a layer, with a checkpoint of the last whole step. */
    fun stop() {
        stopped = true
        if (!isClosed) Native.trainerOrder(id, Directive.STOP.ordinal)
    }

    /** Attaches what was learned so far, also while it runs or is held. */
    suspend fun snapshot(scale: Float = 1f): Adapter = offMain { Adapter(Native.trainerSnapshot(id, scale)) }

    /** Writes a checkpoint, between two runs. */
    suspend fun save() = offMain { Native.trainerSave(id, false) }

    /** Writes the adapter as it is into the run's folder, between two runs. */
    suspend fun saveAdapter() = offMain { Native.trainerSave(id, true) }

    internal companion object {
        suspend fun prepare(engine: Long, options: TrainingOptions, onEvent: (TrainingEvent) -> Unit): Trainer {
            val wish = AtomicReference(Directive.RUN)
            val listener = Listener(wish::get) {
                onEvent(it)
                true
            }
            val lines = options.examples?.joinToString("") { it.line() + "\n" }
            return offMain({ wish.set(Directive.STOP) }) {
                Trainer(Native.trainerNew(engine, options.json(), lines, listener))
            }
        }
    }
}

private class Listener(
    private val ask: () -> Directive,
    /** Whether more is wanted. */
    private val tell: (TrainingEvent) -> Boolean,
) : TrainListener {
    override fun onStep(
        step: Long, steps: Long, loss: Double, heldOutLoss: Double, tokensPerSecond: Double, rate: Double,
    ) = tell(TrainingEvent.Step(step, steps, loss, heldOutLoss.orNull(), tokensPerSecond, rate))

    override fun onProgress(kind: Int, done: Long, all: Long, what: String) {
        val known = TrainingEvent.Progress.Kind.entries.getOrNull(kind)
        tell(if (known == null) TrainingEvent.Warning(what) else TrainingEvent.Progress(known, done, all, what))
    }

    override fun policy() = ask().ordinal

    override fun onEnd(
        done: Boolean, steps: Long, loss: Double, before: Double, after: Double, seconds: Double, peakBytes: Long,
        adapter: String,
    ) {
        tell(TrainingEvent.End(done, steps, loss, before.orNull(), after.orNull(), seconds, peakBytes, adapter))
    }

    private fun Double.orNull() = takeUnless { it.isNaN() }
}
