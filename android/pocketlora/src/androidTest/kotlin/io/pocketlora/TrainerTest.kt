package io.pocketlora

import java.io.File
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertNotEquals
import kotlin.test.assertTrue
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.async
import kotlinx.coroutines.flow.filterIsInstance
import kotlinx.coroutines.flow.first
import kotlinx.coroutines.flow.onEach
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import kotlinx.coroutines.withTimeout
import org.junit.Test

class TrainerTest {
    private suspend fun open() = PocketLora.open(Fixture.model, Fixture.options)

    private suspend fun Trainer.end(policy: () -> Directive = { Directive.RUN }) =
        run(policy).toList().last() as TrainingEvent.End

    /** What a run that nothing interrupts writes. */
    private suspend fun straight(engine: PocketLora): File {
        val out = Fixture.folder()
        engine.trainer(Fixture.training(out)).use { assertTrue(it.end().done) }
        return out
    }

    @Test
    fun aRunTellsItsStepsAndItsAdapterAnswersInAnotherWay() = runBlocking<Unit> {
        open().use { engine ->
            val out = Fixture.folder()
            val chat = engine.chat(ChatOptions(maxTokens = 12))
            val before = chat.ask("what is number 3?").text
            val events = engine.trainer(Fixture.training(out, steps = 20)).use { trainer ->
                val info = trainer.info()
                assertEquals(20L, info.steps)
                assertTrue(info.plannedBytes > 0 && !info.resumed)
                trainer.run().toList()
            }
            val steps = events.filterIsInstance<TrainingEvent.Step>()
            assertEquals((1L..20L).toList(), steps.map { it.step })
            assertTrue(steps.last().loss < steps.first().loss)
            val end = events.last() as TrainingEvent.End
            assertEquals(out.path, end.adapter)

            engine.attach(end.adapter).use { adapter ->
                chat.setMessages(emptyList())
                val after = chat.ask("what is number 3?").text
                assertNotEquals(before, after)
                adapter.scale(0f)
                chat.setMessages(emptyList())
                assertEquals(before, chat.ask("what is number 3?").text)
                adapter.scale(1f)
                assertEquals(emptyList(), adapter.warnings())
                chat.use(emptyList())
                chat.setMessages(emptyList())
                assertEquals(before, chat.ask("what is number 3?").text)
                chat.use(null)

                val files = listOf("adapter_config.json", "adapter_model.safetensors").map { File(out, it).readBytes() }
                adapter.detach()
                val key = ByteArray(32) { it.toByte() }
                val sealed = engine.seal(out.path, key, version = 2)
                for (attach in listOf<suspend () -> Adapter>(
                    { engine.attach(files[0], files[1], "from memory") },
                    { engine.attachSealed(sealed, key, leastVersion = 2) },
                )) {
                    attach().use {
                        chat.setMessages(emptyList())
                        assertEquals(after, chat.ask("what is number 3?").text)
                    }
                }
                val wrong = ByteArray(32)
                throws<PocketLoraException.Key> { engine.attachSealed(sealed, wrong) }
                throws<PocketLoraException.Key>("32 bytes") { engine.attachSealed(sealed, ByteArray(5)) }
                throws<PocketLoraException.Outdated> { engine.attachSealed(sealed, key, leastVersion = 3) }
                sealed[sealed.size - 1] = (sealed.last() + 1).toByte()
                throws<PocketLoraException.Format>("changed") { engine.attachSealed(sealed, key) }
                throws<PocketLoraException.Closed> { adapter.scale(1f) }
            }
            chat.close()
        }
    }

    @Test
    fun pauseAndResumeChangeNothing() = runBlocking<Unit> {
        open().use { engine ->
            val expected = Fixture.bytes(straight(engine))
            val out = Fixture.folder()
            engine.trainer(Fixture.training(out)).use { trainer ->
                trainer.pause()
                val run = async(Dispatchers.Default) { trainer.end() }
                assertTrue(trainer.awaitPaused())
                // While it is held, what it has learned can be tried, and chats have the device to themselves.
                trainer.snapshot().use { engine.chat(ChatOptions(maxTokens = 4)).use { chat -> chat.ask("hello") } }
                throws<PocketLoraException.Busy>("trainer") { trainer.info() }
                throws<PocketLoraException.Busy>("trainer") { trainer.end() }
                assertTrue(run.isActive)
                trainer.resume()
                assertTrue(run.await().done)
            }
            assertEquals(expected, Fixture.bytes(out))
        }
    }

    @Test
    fun aStoppedRunGoesOnInAnotherEngineWithTheSameResult() = runBlocking<Unit> {
        val out = Fixture.folder()
        val expected = open().use { engine ->
            engine.trainer(Fixture.training(out)).use { trainer ->
                val events = trainer.run().onEach { if ((it as? TrainingEvent.Step)?.step == 2L) trainer.stop() }.toList()
                val end = events.last() as TrainingEvent.End
                assertTrue(!end.done && end.steps < 6)
            }
            throws<PocketLoraException.Config>("unfinished run") { engine.trainer(Fixture.training(out)) }
            Fixture.bytes(straight(engine))
        }
        open().use { engine ->
            // Neither the data nor a setting is given: the folder has them.
            engine.trainer(TrainingOptions(out.path, start = Start.RESUME, choose = false)).use { trainer ->
                assertTrue(trainer.info().resumed)
                assertTrue(trainer.end().done)
            }
        }
        assertEquals(expected, Fixture.bytes(out))
    }

    @Test
    fun aCancelledCollectorLeavesACheckpointAndTheRunCanGoOn() = runBlocking<Unit> {
        open().use { engine ->
            val out = Fixture.folder()
            engine.trainer(Fixture.training(out)).use { trainer ->
                withTimeout(60_000) { trainer.run().filterIsInstance<TrainingEvent.Step>().first { it.step == 2L } }
                assertTrue(File(out, "checkpoint.safetensors").isFile)
                assertTrue(trainer.end().done)
            }
            assertEquals(Fixture.bytes(straight(engine)), Fixture.bytes(out))
        }
    }

    @Test
    fun thePolicyHoldsAndStopsAndWhatItThrowsEndsTheRun() = runBlocking<Unit> {
        open().use { engine ->
            val out = Fixture.folder()
            engine.trainer(Fixture.training(out)).use { trainer ->
                var asked = 0
                // It waits five times before it may work at all.
                assertFalse(trainer.end { if (++asked < 5) Directive.PAUSE else Directive.STOP }.done)
                assertTrue(asked >= 5)
                throws<IllegalStateException>("battery") { trainer.end { error("battery") } }
                throws<IllegalStateException>("collected") {
                    trainer.run().collect { error("collected") }
                }
                trainer.save()
                assertTrue(trainer.end().done)
            }
            assertEquals(Fixture.bytes(straight(engine)), Fixture.bytes(out))
        }
    }

    @Test
    fun closingWhileItRunsStopsItWithACheckpoint() = runBlocking<Unit> {
        open().use { engine ->
            val out = Fixture.folder()
            val trainer = engine.trainer(Fixture.training(out, steps = 100_000))
            val end = withTimeout(60_000) {
                trainer.run().onEach { if ((it as? TrainingEvent.Step)?.step == 1L) trainer.close() }.toList().last()
            }
            assertFalse((end as TrainingEvent.End).done)
            assertTrue(File(out, "checkpoint.safetensors").isFile)
            throws<PocketLoraException.Closed>("trainer") { trainer.end() }
        }
    }

    @Test
    fun dataAndSettingsThatAreWrongAreNamed() = runBlocking<Unit> {
        open().use { engine ->
            val good = Fixture.training(Fixture.folder())
            throws<PocketLoraException.Config>("rnk") { engine.trainer(good.copy(settings = mapOf("rnk" to 3))) }
            throws<PocketLoraException.Data> { engine.trainer(good.copy(examples = emptyList())) }
            throws<PocketLoraException.Io>("no-such-file") { engine.trainer(good.copy(examples = null, data = "/no-such-file")) }
            throws<PocketLoraException.Config>("(MB) for this model") {
                engine.trainer(good.copy(settings = good.settings + ("memory-budget" to 1)))
            }
        }
    }
}
