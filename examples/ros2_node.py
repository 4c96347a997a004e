"""A ROS 2 node of one agent: observations come as a topic, and commands go out at the control rate.

    python ros2_node.py --ros-args -p endpoint:=127.0.0.1:8502 -p agent:=agent_2

`AgentLoop` is what the node does, and needs no ROS: a test runs it as it stands. The node itself is not tested.
"""

import time

from omcda_deploy import ContractError, EndpointError, RemotePolicy

try:
    import rclpy
    from rclpy.node import Node
    from std_msgs.msg import Float32MultiArray
except ImportError:
    rclpy, Node = None, object


class AgentLoop:
    """The newest observation in, a command out; `stop` where the observation or the answer is late or refused."""

    def __init__(self, policy, period, stop):
        self.policy, self.period, self.stop = policy, period, list(stop)
        self.observation, self.seen = None, float("-inf")

    def observe(self, values, now):
        """Keep an observation that came at `now`, in seconds."""
        self.observation, self.seen = values, now

    def command(self, now):
        """Return the command for `now` and, where it is `stop`, the reason."""
        if now - self.seen > 2 * self.period:
            return self.stop, "no observation in the last two periods"
        try:
            decision = self.policy.act(self.observation)
        except (ContractError, EndpointError) as error:  # a message of another length or with NaN
            return self.stop, str(error)
        return decision.action.tolist(), None


class AgentNode(Node):
    """Topics `observation` and `command`, both Float32MultiArray, in the order of `omcda-deploy describe TASK`."""

    def __init__(self):
        super().__init__("omcda_agent")
        endpoint = self.declare_parameter("endpoint", "127.0.0.1:8500").value
        agent = self.declare_parameter("agent", "agent_0").value
        policy = RemotePolicy(endpoint, agent)
        period = 1 / policy.team.control_rate
        policy.close()
        policy = RemotePolicy(endpoint, agent, deadline_s=period / 2, stream=True)
        self.loop = AgentLoop(policy, period, [0.0] * policy.spec.action.size)
        self.commands = self.create_publisher(Float32MultiArray, "command", 1)
        self.create_subscription(Float32MultiArray, "observation", self.observe, 1)
        self.create_timer(period, self.step)

    def observe(self, message):
        self.loop.observe(message.data, time.monotonic())

    def step(self):
        command, reason = self.loop.command(time.monotonic())
        if reason:
            self.get_logger().warning(f"stopped: {reason}", throttle_duration_sec=1.0)
        self.commands.publish(Float32MultiArray(data=command))


def main():
    if rclpy is None:
        raise SystemExit(
            "rclpy is not installed: run this in a ROS 2 environment (source /opt/ros/…/setup.bash)"
        )
    rclpy.init()
    rclpy.spin(AgentNode())


if __name__ == "__main__":
    main()
